"""Writes big.json: one array of N MB on one line (default 100), LLaVA-like native records."""

import json
import sys

n = int(sys.argv[1]) if len(sys.argv) > 1 else 100
r = json.dumps({"query": "<image>" + "word " * 60, "response": "reply " * 40, "images": ["a.png"]})
count = n * 1_000_000 // (len(r) + 2)
with open("big.json", "w") as f:
    f.write("[" + ", ".join([r] * count) + "]")
print(count, "records")
