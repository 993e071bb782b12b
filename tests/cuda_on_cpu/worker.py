"""Runs one function of a compiled test module under the sanitizers; started by tests/kernels/cuda_on_cpu.py."""

import importlib.machinery
import importlib.util
import pickle
import sys

name, path, function, arguments, seeds = pickle.load(sys.stdin.buffer)
loader = importlib.machinery.ExtensionFileLoader(name, path)
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
loader.exec_module(module)
results = []
for seed in seeds:
    module.set_seed(seed)
    try:
        results.append(getattr(module, function)(*arguments))
    except RuntimeError as error:
        results.append(error)
pickle.dump(results, sys.stdout.buffer)
