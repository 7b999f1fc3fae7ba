"""The command line as a user meets it: verbs, messages, exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import reversa
from reversa import cli
from reversa.cli import main

COMMAND = [sys.executable, "-c", "import sys; from reversa.cli import main; sys.exit(main())"]


def told(capsys) -> tuple[str, str]:
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_verb(capsys, arguments):
    with pytest.raises(SystemExit) as leaves:
        main(arguments)
    assert leaves.value.code == 0
    out, _ = told(capsys)
    assert all(re.search(rf"^  {verb} .*{re.escape(does)}$", out, re.M) for verb, does in cli.VERBS.items())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_of_its_own(capsys, verb):
    with pytest.raises(SystemExit) as leaves:
        main([verb, "--help"])
    assert leaves.value.code == 0
    assert f"usage: reversa {verb}" in told(capsys)[0]


def test_version(capsys):
    with pytest.raises(SystemExit) as leaves:
        main(["--version"])
    assert leaves.value.code == 0
    assert told(capsys)[0] == f"reversa {reversa.__version__}\n"


def test_a_reader_that_has_seen_enough():
    with subprocess.Popen([*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        assert writer.stderr.read() == ""
        assert writer.wait(60) == 0


def test_help_loads_torch_and_no_package_of_an_extra():
    code = (
        "import sys; from reversa.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "extras = {'lightning', 'torchvision', 'jsonargparse', 'rich', 'sklearn', 'matplotlib'}\n"
        "print(sorted(extras & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean: train"),
        (["train", "--scheme", "revnett"], "Did you mean: revnet"),
        (["train", "--gamma", "-0.5"], r"(0, 1], got -0.5"),
        (["train", "--out", "/dev/null/run"], "cannot make the folder /dev/null/run"),
        (["train", "--device", "mps"], "device=mps"),
        (["train", "--precision", "16", "--device", "cpu"], "choose bf16-mixed"),
        (["train", "--resume", "none.ckpt"], "there is no checkpoint none.ckpt"),
        (["check", "resnet51"], "Did you mean: resnet"),
        (["check", "resnet18", "--scheme", "momentums"], "Did you mean: momentum"),
        (["check", "resnet18", "--scheme", "revnet", "--gamma", "0.5"], "has no gamma"),
        (["check", "resnet18", "--gamma", "7"], "(0, 1], got 7"),
        (["check", "resnet18", "--batch", "0"], "--batch must be at least 1"),
        (["check", "vit_b_32"], "vit_b_32 does not take images of 64 x 64 pixels"),
        (["check", "revnet38"], "reversa.check(reversa.models.create('revnet38'), images)"),
        (["models", "--classes", "0"], "--classes must be at least 1, got 0"),
        (["train", "--device", "mps"], "choose auto or cpu"),
    ],
)
def test_mistakes_are_a_message_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    out, err = told(capsys)
    assert out == ""
    assert err.startswith("reversa: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["train"], "jsonargparse", "train"),
        (["train"], "lightning.pytorch", "train"),
        (["check", "resnet18"], "torchvision.models", "vision"),
    ],
)
def test_a_missing_extra_is_a_message_and_status_2(capsys, monkeypatch, tmp_path, arguments, module, extra):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(arguments) == 2
    assert f"pip install 'reversa[{extra}]'" in told(capsys)[1]
    assert not list(tmp_path.iterdir())


def test_print_config_can_be_read_again(capsys, tmp_path):
    with pytest.raises(SystemExit) as leaves:
        main(["train", "--depth", "70", "--print_config"])
    assert leaves.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(told(capsys)[0])
    from reversa.train.config import parse

    assert parse(["--config", str(file)]).depth == 70


def test_ctrl_c_anywhere_is_status_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    import reversa.cli.train

    monkeypatch.setattr(reversa.cli.train, "parse", interrupted)
    assert main(["train"]) == 130
    assert told(capsys)[1] == "Interrupted.\n"


@pytest.mark.slow
def test_ctrl_c_leaves_a_whole_checkpoint_and_says_how_to_go_on(tmp_path):
    flags = ["--depth", "3", "--width", "4", "--epochs", "2000", "--out", "run"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [*COMMAND, "train", *flags],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert err.splitlines() == [
        f"Stopped at step {step} of 38000. The checkpoint is whole: run/checkpoints/last.ckpt",
        "To go on: reversa train --config run/config.yaml --resume run/checkpoints/last.ckpt",
    ]


class Report:
    """A verdict, as ``reversa.check`` gives one."""

    def __init__(self, ok: bool) -> None:
        self.ok = ok

    def __str__(self) -> str:
        return f"the verdict is {self.ok}"

    def to_dict(self) -> dict[str, bool]:
        return {"ok": self.ok}


@pytest.mark.parametrize("ok", [True, False])
def test_the_verdict_of_a_check_is_its_exit_status(capsys, monkeypatch, ok):
    pytest.importorskip("torchvision", reason="the extra vision is not installed", exc_type=(ImportError, RuntimeError))
    seen = []

    import reversa.cli.check

    def check(model, images):
        seen.append((type(model).__name__, tuple(images.shape)))
        return Report(ok)

    monkeypatch.setattr(reversa.cli.check, "check", check)
    assert main(["check", "resnet18", "--batch", "3", "--image", "40"]) == (0 if ok else 1)
    assert told(capsys)[0] == f"the verdict is {ok}\n"
    assert main(["check", "resnet18", "--json"]) == (0 if ok else 1)
    assert json.loads(told(capsys)[0]) == {"ok": ok}
    assert seen[0] == ("ResNet", (3, 3, 40, 40))


@pytest.mark.parametrize("name", ["resnet50", "torchvision:resnet50"])
def test_check_means_torchvisions_network_where_both_have_one(name):
    """The README's own command."""
    pytest.importorskip("torchvision", reason="the extra vision is not installed", exc_type=(ImportError, RuntimeError))
    from reversa.cli.check import _model

    assert type(_model(name)).__module__.startswith("torchvision.")
    with pytest.raises(reversa.errors.SettingError, match=r"hamiltonian74 is one of Reversa's own"):
        _model("hamiltonian74")
