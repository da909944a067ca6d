"""Without an NVIDIA device, Triton's kernels run in its interpreter: to be said before triton is first imported."""

import dataclasses
import functools
import os
import sys
from pathlib import Path

devices = [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("dxg")]  # without initialising CUDA
if not devices or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Threads gain nothing at toy sizes, and wait for each other, spinning, where something else runs on the other core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
        spare_the_interpreter()


def spare_the_interpreter():
    """Takes from Triton's interpreter what it does again and again to no effect, over half of its time; nothing from that of
    another version, whose parts have other names."""
    from triton.runtime import interpreter

    if not {"interpreter_builder", "_patch_lang", "_LangPatchScope", "GridExecutor"} <= vars(interpreter).keys():
        return
    # Whether a sum of integers overflows is computed, by six operations on tensors, and asserted with debug=True alone.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    # Each call of a device function, which tl.sum is, looks through all of triton.language for what to patch. What a launch
    # has patched stays so until it ends.
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @functools.cache
    def key(fn):
        languages = interpreter.tl, interpreter.tl.core
        return frozenset(name.__name__ for name in fn.__globals__.values() if any(name is lang for lang in languages))

    def patch_once(fn):
        languages = key(fn)
        if languages in patched:
            return interpreter._LangPatchScope()
        patched.add(languages)
        return patch(fn)

    def start(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, start
