"""Measurements behind docs/performance.md; nothing of vlft imports them.

__main__     names of the commands; each is a module with a main(arguments)
command      options, result files and tables of all commands
measure      seconds and peak memory of a computation

training     a LoRA job: shapes -> models, workloads -> samples, both -> sides -> comparison
experts      a mixture-of-experts layer
loss         the loss of the targets
"""
