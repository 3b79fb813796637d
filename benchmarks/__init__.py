"""Measurements behind docs/performance.md; nothing in vlft imports them.

__main__    the names of the benchmarks; each is a module with a main(arguments)
command     options, result files and tables of all benchmarks
measure     seconds and peak memory of a computation

training, arithmetic, plan    a LoRA job: models and samples -> job -> sides
attention, experts, loss      one part of a step
startup                       the command line
"""
