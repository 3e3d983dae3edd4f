"""The command lines: help, messages for typing errors, and for missing packages."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import controlnet
from controlnet import __main__ as overview
from controlnet import config, encode, generate, train
from controlnet.common import command, extras
from controlnet.config import __main__ as reference
from controlnet.config.reference import markdown
from controlnet.config.stages import ARGUMENTS
from controlnet.quickstart import __main__ as quickstart
from controlnet.training.run import check_resume
from tests.controlnet import tiny_run

ROOT = Path(controlnet.__file__).parents[1]
MAINS = {
    "train": train.main,
    "generate": generate.main,
    "encode": encode.main,
    "config": reference.main,
    "quickstart": quickstart.main,
}


def run(code, *, blocked=()):
    """stdout and stderr of Python code in an environment that lacks some packages."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    own = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")  # set by a command before
    env = {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONPATH": str(ROOT)}
    script = f"import sys\n{block}{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=300)


def test_the_page_of_all_keys_is_that_of_the_tables():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == markdown() + "\n", "python -m controlnet.config > docs/configuration.md"


def test_every_key_says_what_it_does():
    for path, key in config.checks.every_key():
        assert key.effect, path
    for target, keys in ARGUMENTS.items():
        assert all(key.effect for key in keys.values()), target


def test_the_overview_names_every_entry_point(capsys):
    files = (ROOT / "controlnet").glob("*.py")
    entries = [path.stem for path in files if re.search('__name__ [!=]= "__main__"', path.read_text())]
    entries += [path.parent.name for path in (ROOT / "controlnet").glob("*/__main__.py")]
    text = overview.text()
    named = re.findall(r"python -m controlnet\.(\w+)", text)
    assert sorted(named) == sorted(set(entries) - {"__main__"})
    assert all(path in text for path in command.shipped()) and len(command.shipped()) >= 3


@pytest.mark.parametrize("name", sorted(set(MAINS) - {"quickstart"}))
def test_help_names_the_shipped_configurations(name, capsys):
    with contextlib.suppress(SystemExit):
        MAINS[name](["--help"])
    text = capsys.readouterr().out
    assert all(Path(path).name in text for path in command.shipped())
    for path in re.findall(r"controlnet/configs/\w+\.yaml", text.partition("examples:")[2]):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", "x.yaml", "--model.seed=2"], "write model.seed=2, without dashes"),
        (["--config", "x.yaml", "--modle"], "--modle is not known"),
        (["--config", "x.yaml", "model.seed"], "model.seed.*key=value"),
    ],
)
def test_slips_of_the_pen(arguments, words, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    "arguments, words, status",
    [
        (["--config", "absent.yaml"], "error: .*absent.yaml", 1),
        (["--config", "x.yaml", "model.seed"], "train: error: model.seed .*key=value", 2),
    ],
)
def test_the_last_words_under_torchrun(arguments, words, status, tmp_path, monkeypatch):
    """torchrun ends with a traceback of its own, whose last lines are what the first rank to fail left in a file."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit):
        train.main(arguments)
    first = ProcessFailure(0, 1, status, str(file))
    later = ProcessFailure(1, 2, -15, str(tmp_path / "none"))
    later.timestamp += 1
    *_, last, line = str(ChildFailedError("train", {0: first, 1: later})).splitlines()
    assert set(line) == {"="} and re.search(f"traceback : .*{words}", last)


def test_last_words_that_cannot_be_left_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    with pytest.raises(SystemExit) as caught:
        command.fail("stopped by SIGTERM", 143)
    assert caught.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM\n"


def test_settings_stand_anywhere():
    arguments = train._arguments(["model.seed=1", "--config", "x.yaml", "model.seed=2"])
    assert arguments.config == "x.yaml" and arguments.overrides == ["model.seed=1", "model.seed=2"]


def test_a_weights_file_is_no_checkpoint_to_go_on_from(tmp_path):
    (tmp_path / "control.pth").write_bytes(b"x")
    cfg = tiny_run.configuration(tmp_path, f"exp_manager.resume_from_checkpoint={tmp_path}/control.pth")
    with pytest.raises(config.ConfigError, match=r"a file; .*control_stage_config.from_pretrained .*model.ckpt_path"):
        check_resume(cfg)


def test_config_command(tmp_path, capsys):
    path = ROOT / "controlnet" / "configs" / "quickstart.yaml"
    assert reference.main([str(path), "model.seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: model.sede is not a known key; the nearest is model.seed"):
        reference.main([str(path), "model.sede=7"])


@pytest.mark.parametrize(
    "code, blocked, words",
    [
        (
            "from controlnet.train import main; main(['--config', 'x.yaml'])",
            ["omegaconf", "tqdm"],
            "omegaconf and tqdm are not",
        ),
        ("from controlnet.train import main; main(['--config', 'x.yaml'])", ["tqdm"], "tqdm is not installed"),
        (
            "from controlnet.quickstart.__main__ import main; main([])",
            ["omegaconf", "webdataset"],
            "omegaconf and webd",
        ),
        (
            "from controlnet.generate import main; main(['--checkpoint', '.', '--hint', 'x', '--prompt', 'y'])",
            ["omegaconf", "tqdm"],
            "omegaconf and tqdm are not installed",
        ),
        ("from controlnet.config.__main__ import main; main(['x.yaml'])", ["omegaconf"], "omegaconf is not installed"),
    ],
)
def test_a_missing_package_is_named_by_every_command(code, blocked, words):
    done = run(code, blocked=blocked)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last and "pip install" in last


@pytest.mark.parametrize("name", ["accelerate", "restore"])
def test_a_missing_diffusers_is_named_by_accelerate(name):
    done = run(
        f"import controlnet\ntry: controlnet.{name}(None)\nexcept ImportError as error: print(error)",
        blocked=["diffusers"],
    )
    assert "diffusers is not installed" in done.stdout and "pip install diffusers" in done.stdout, done.stderr


def test_require_names_all_that_is_missing():
    extras.require("sys", extra="train", wanted_by="x")
    with pytest.raises(
        ImportError, match=r"cn_absent and cn_too are not installed: x\. pip install cn_absent cn_too, or"
    ):
        extras.require("cn_absent", "cn_too", extra="train", wanted_by="x")


def test_libraries_are_quiet_unless_the_user_has_set_them(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "debug")
    extras.quiet_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error" and os.environ["DIFFUSERS_VERBOSITY"] == "debug"


@pytest.mark.parametrize("quiet", [True, False])
def test_what_libraries_print_while_they_load_does_not_reach_users(quiet, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from tests.controlnet import tiny

    tiny.clip_folder(tmp_path / "clip")
    tiny.vae().save_pretrained(tmp_path / "vae")
    done = run(
        f"from controlnet.common.extras import quiet_libraries\nif {quiet}: quiet_libraries()\n"
        "from controlnet.conditioning import AutoencoderKL, CLIPTextEncoder\n"
        f"AutoencoderKL({str(tmp_path / 'vae')!r}, precision='bf16')\n"
        f"CLIPTextEncoder({str(tmp_path / 'clip')!r}, max_length=12, precision='fp16')"
    )
    assert done.returncode == 0 and not done.stdout
    assert (done.stderr == "") == quiet  # what transformers prints shows that there is something to keep away


def test_environment_report_has_help():
    done = subprocess.run(
        [sys.executable, "-m", "cnkernels.env", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0 and "usage: python -m cnkernels.env" in done.stdout
