"""The sanitizer's program: its arguments, and that its paths are different ones."""

import pytest
import torch

from sieve.scripts import sanitize_kernels


def test_arguments(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize_kernels.main(["--paths", "group16,fp32"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sanitize_kernels.main(["--paths", "group16,group7"])
    assert "group7 is not of group16, group16-192" in capsys.readouterr().err


def test_paths_reach_what_they_name():
    pytest.importorskip("triton")
    from sieve.kernels.nsa.select_config import by_list

    size = {"bfloat16": 2, "float32": 4}
    lists = {
        name for name, path in sanitize_kernels.PATHS.items()
        if not path.decode and by_list(path.shape[0] // path.shape[1], *path.shape[2:], 64, size[path.dtype])
    }
    assert "group4" in lists and "group16" not in lists


@pytest.mark.gpu
@pytest.mark.parametrize("name", sanitize_kernels.PATHS)
def test_gpu_paths_run(name):
    sanitize_kernels.run(sanitize_kernels.PATHS[name])


@pytest.mark.gpu
def test_gpu_control_runs(capsys):
    assert sanitize_kernels.main(["--paths", "control,control-mbarrier"]) == 0
    assert "control-mbarrier: done" in capsys.readouterr().out
