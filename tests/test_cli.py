# ruff: noqa: F811 (fixtures are imported)
"""The command line: what it says to those who begin, to machines, and to those who err."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paredown
from paredown import cli
from paredown.core.errors import UserError
from paredown.core.results import Run
from tests.test_run import NO_TRAIN, TINY, here, paredown_cli, user  # noqa: F401

VERBS = ("check", "baseline", "plan", "run", "report", "replay")
RUN = ("run", "net.py", "--size", "0.5x", "--out", "r")


def changed(**fields):
    inside = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"old = task\ndef task():\n    return old({inside})\n"


# --- help, JSON, progress --------------------------------------------------------------------


def test_help_teaches(paredown_cli):
    code, out, _ = paredown_cli("--help")
    text = " ".join(out.split())
    assert code == 0 and "Start with check, then run." in text
    for words in (
        *("Exit codes: 0 done and every goal met", "1 a problem", "2 wrong usage"),
        *("3 finished, but a goal was missed", "4 a replay", "130 interrupted"),
    ):
        assert words in text
    assert all(f" {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_teaches(paredown_cli, verb):
    code, out, _ = paredown_cli(verb, "--help")
    assert code == 0
    import typer

    for param in typer.main.get_command(cli.app).commands[verb].params:
        assert param.name == "help" or (param.help or "").endswith((".", '.")')), param.name
    asked = {param.name for param in typer.main.get_command(cli.app).commands[verb].params}
    measuring = {"runtime", "device", "threads", "rounds"}
    assert asked & measuring in (set(), {"runtime"}, measuring)
    assert (measuring <= asked) == (verb in ("baseline", "plan", "run"))
    if verb in ("plan", "run"):
        assert '"500KB", "0.3x"' in out and "onnxruntime," in out


def test_a_wrong_command_is_wrong_usage(paredown_cli):
    for words in (["fly"], ["run"], ["run", "a.py", "--siez", "1B"], ["run", "a", "--seed", "x"]):
        assert paredown_cli(*words)[0] == 2


def test_json_of_every_verb_is_one_object(user, paredown_cli):
    user("print('loading')\n" + NO_TRAIN)

    def found(*words):
        code, out, err = paredown_cli(*words, "--json")
        assert code == 0 and "error" not in err
        return json.loads(out)

    assert found("check", "net.py")["problems"] == []
    assert found("baseline", "net.py")["size_bytes"] > 0
    recipes = found("plan", "net.py", "--size", "0.5x")["recipes"]
    titles = [item["title"] for item in recipes]
    assert titles[0] == "int8" and titles[-1] == "fp16"
    assert any("prune_channels" in item["recipe"] for item in recipes)
    assert found(*RUN)["met"] is True
    assert found("report", "r") == {"report": "r/report.html"}
    assert found("replay", "r")["same"] is True


def test_progress_is_line_by_line_and_silent_when_asked(user, paredown_cli):
    user(NO_TRAIN)
    _, out, err = paredown_cli(*RUN)
    assert err == "" and not re.search(r"[\r\x1b\b]", out)
    said = ["Baseline: ", "Plan", "Recipe: int8", "8-bit integers: kept", "Proof: ", "Artifact: "]
    places = [out.index(words) for words in said]
    assert places == sorted(places)
    Path("r").rename("first")
    _, out, err = paredown_cli(*RUN, "--quiet")
    assert err == "" and out.startswith("The exported file beside the original")
    assert "Artifact: r/model.onnx" in out and "Report:   r/report.html" in out


def test_baseline_and_plan_and_report(user, paredown_cli):
    user()
    code, out, _ = paredown_cli("baseline", "net.py")
    assert code == 0 and "size on disk" in out and "score on validation (60)" in out
    assert "peak memory" in out and "onnxruntime" in out
    code, out, _ = paredown_cli("plan", "net.py", "--latency", "0.5x", "--size", "15KB")
    assert code == 0 and "1. int4 with training: size and latency are asked for" in out
    assert "2. Factor to " in out and "3. Cut channels to " in out
    assert "then int8: size and latency are asked for: leave " in out
    assert "expected: about" in out and not Path("runs").exists()
    paredown_cli("run", "net.py", "--size", "10MB", "--out", "r")
    Path("r/report.html").unlink()
    Path("r").rename("r [x] 1")
    code, out, _ = paredown_cli("report", "r [x] 1")
    assert code == 0 and out == "Report: r [x] 1/report.html\n"
    assert Path("r [x] 1/report.html").exists()
    Path("r [x] 1/run.json").write_text("{}")
    code, _, err = paredown_cli("report", "r [x] 1")
    assert code == 1 and "is damaged" in err


def test_nothing_else_is_said_on_standard_error(tmp_path):
    """The installed command, its warnings shown."""
    (tmp_path / "net.py").write_text(TINY)
    command = [str(Path(sys.executable).with_name("paredown")), "check", "net.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "ok captured: 14,596 parameters, 4 layers with weights",
        "ok scored one batch of validation",
        "ok loss and gradients of one training batch are finite",
        "ok exported to onnxruntime, 59.4 KB; the file agrees with the model",
    ]


# --- mistakes --------------------------------------------------------------------------------

NAN = "torch.full((9, 1, 8, 8), float('nan'))"
WIDE = "TensorDataset(torch.zeros(9, 1, 9, 9), torch.zeros(9, dtype=torch.long))"
HALF = "TensorDataset(torch.zeros(9, 1, 8, 8).double(), torch.zeros(9, dtype=torch.long))"
BROKEN = """
old = model
def model():
    net = old()
    net[0].bias.data[0] = torch.nan
    return net
"""
FILES = {  # changes to the user's file -> what is said
    "def broken(:": r"net\.py: SyntaxError",
    "del model": r"net\.py: defines no function model\(\)",
    "del task": r"net\.py: defines no function task\(\)",
    "def model():\n    raise OSError('no weights')": r"model\(\) failed: .*OSError: no weights",
    "def task():\n    raise ValueError('no data')": r"net\.py:\d+ .*ValueError: no data",
    "import sys\nsys.exit(0)": r"net\.py:\d+ `sys\.exit\(0\)`: SystemExit: 0",
    "def model():\n    raise SystemExit": r"net\.py: model\(\) failed: .*SystemExit",
    "def task():\n    return {}": r"task\(\) returned a dict, not a paredown\.Task",
    "def model():\n    return 3": r"model\(\) returned a int, not an nn\.Module",
    BROKEN: r"0\.bias: 1 of 16 weights are NaN or infinite",
    changed(test=f"TensorDataset({NAN}, torch.zeros(9))"): "9 of 9 examples of test hold NaN",
    changed(validation="images(1, 0)"): "its validation split has 0 examples",
    changed(train="images(1, 1)"): "its train split has 1 examples; at least 2 are needed",
    changed(validation="None"): "task: has no validation; decisions are made on it",
    changed(test="None"): "task: has no test; the final claim is made on it",
    changed(score="None"): "task: has no score",
    changed(example="(torch.zeros(1, 3, 8, 8),)"): r"net\.py|the model fails on its example inputs",
    changed(example="(torch.zeros(1, 1, 8, 8), 1)"): "example: does not fit Sequential",
    changed(test=WIDE): r"its test split does not fit the example: .*got \(9, 1, 9, 9\)",
    changed(train=HALF): r"its train split gives torch\.float64 for input 'input'",
    changed(score="lambda out, y: (out.argmax(1) == y).float().mean()"): (
        r"task\.score: expected one number for each example, shape \(20,\), got \(\)"
    ),
    changed(score="lambda out, y: out.label"): r"task\.score failed: ",
    changed(loss="lambda out, y: F.cross_entropy(out, y) * torch.nan"): "the loss or its gradient",
    changed(loss="lambda out, y: F.cross_entropy(out, y, reduction='none')"): (
        r"task\.loss: expected one number, a tensor of shape \(\), got \(20,\)"
    ),
    changed(loss="lambda out, y: out.missing"): r"task\.loss failed: AttributeError",
}


def refused(outcome, *said):
    """Exit code 1, every one of ``said``, and nothing half-written."""
    code, out, err = outcome
    assert code == 1 and err.startswith("error: ")
    for words in said:
        assert re.search(words, " ".join(err.split())), err
    assert "Results in" not in out and not Path("r").exists() and not Path("runs").exists()


@pytest.mark.parametrize(("changes", "said"), FILES.items(), ids=lambda text: text[:40])
def test_what_is_wrong_with_a_file_is_said(user, paredown_cli, changes, said):
    user(changes)
    refused(paredown_cli(*RUN), said)


def test_a_file_must_be_there_and_python(user, paredown_cli):
    refused(paredown_cli("run", "nowhere.py", "--out", "r"), r"nowhere\.py: no such file")
    Path("net.txt").write_text(TINY)
    refused(paredown_cli("run", "net.txt", "--out", "r"), "expected a Python file")
    refused(paredown_cli("run", ".", "--out", "r"), r"\.: is a folder; expected a Python file")


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "net.pte": "a file that a runtime runs: paredown.open runs it",
        "net.pth": r"holds weights without their module; load them in model\(\)",
        "net.tflite": "is a TensorFlow model; convert it by tf2onnx",
        "net.npz": "is no model; samples are named by --data",
        "run/run.json": "is a run's folder, for paredown report",
        "tf/saved_model.pb": "is a TensorFlow model; convert it by tf2onnx",
    }.items(),
)
def test_what_is_no_python_file_is_told_for_what_it_is(user, paredown_cli, name, said):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    where = name.partition("/")[0]
    for verb in ("run", "check", "inspect", "baseline", "plan"):
        code, out, err = paredown_cli(verb, where)
        assert re.search(said, out + err) and "expected a Python file" in out + err
        assert code == 1
    if "/" not in name:
        for verb in ("report", "explain", "replay"):
            code, _, err = paredown_cli(verb, name)
            assert code == 1 and f"{name}: is a file, so it holds no finished run" in err


@pytest.mark.parametrize("name", ["net.pt2", "net.safetensors"])
def test_a_model_without_its_task_needs_samples(user, paredown_cli, name):
    Path(name).touch()
    for verb in ("run", "check", "baseline", "plan"):
        code, out, err = paredown_cli(verb, name)
        assert (
            code == 1 and "is a model without its task: check, baseline, plan and run" in out + err
        )
        assert "--data samples.npz" in out + err
    code, out, err = paredown_cli("inspect", name)
    assert code == 1 and "--data" not in out + err
    if name == "net.pt2":
        with pytest.raises(UserError, match=r"opens \.pt2 files; expected an arti"):
            paredown.open(name)


def test_a_run_is_named_by_its_folder(paredown_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r").mkdir()
    Path("r/run.json").touch()
    code, _, err = paredown_cli("report", "r/run.json")
    assert code == 1 and "name its folder, r." in err
    code, _, err = paredown_cli("explain", "nowhere")
    assert code == 1 and "nowhere: no such folder, so it holds no finished run" in err


def test_a_recipe_of_ones_own_is_planned(user, paredown_cli):
    user()
    Path("own.toml").write_text('[[step]]\nname = "cast"\ndtype = "bf16"\n')
    code, _, err = paredown_cli("plan", "net.py", "--recipe", "own.toml")
    assert code == 1 and "onnxruntime cannot run bf16" in err
    Path("own.toml").write_text('[[step]]\nname = "cast"\n')
    code, out, _ = paredown_cli("plan", "net.py", "--recipe", "own.toml", "--size", "0.6x")
    assert code == 0 and "1. as asked: the recipe that was given" in out and "expected" not in out


@pytest.mark.parametrize(
    ("name", "meant"),
    {"tflite": "litert", "ort": "onnxruntime", "ov": "openvino", "et": "executorch"}.items(),
)
def test_a_runtime_is_known_by_its_other_names(user, paredown_cli, name, meant):
    user()
    refused(paredown_cli(*RUN, "--runtime", name), f"did you mean '{meant}'")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--size", "12 parsecs"), ("--size", "-5KB"), ("--size", "0x"), ("--size", "nan")),
        *(("--latency", "1"), ("--latency", "5KB"), ("--latency", "infs"), ("--memory", "0MB")),
        *(("--throughput", "many"), ("--energy", "1e999mJ"), ("--size", "")),
        *(("--max-drop", "1"), ("--max-drop", "200%"), ("--max-drop", "nan")),
    ],
)
def test_goals_that_cannot_be_read(user, paredown_cli, option, value):
    user()
    name = option.removeprefix("--").replace("-", "_")
    refused(paredown_cli("run", "net.py", option, value, "--out", "r"), f"{name}: cannot read")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--runtime", "tensorfloe", "'tensorfloe' is not one of onnxruntime, openvino"),
        ("--device", "telnet://pi", "'telnet://pi' is not one of local"),
        ("--threads", "0", "threads: expected a whole number from 1 to 1024, got 0"),
        ("--rounds", "0", "rounds: expected a whole number from 2 up, got 0"),
        ("--recipe", "nowhere.toml", r"nowhere\.toml: cannot be read: No such file"),
    ],
)
def test_options_that_cannot_be_met(user, paredown_cli, option, value, said):
    user()
    refused(paredown_cli(*RUN, option, value), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe[[step]]", "it is not UTF-8 text"),
        (b"[[step", "not a recipe in TOML"),
        (b"", r"holds no \[\[step\]\]"),
        (b"[[steps]]\nname = 'quantize'", "expected .* nothing else, found 'steps'"),
        (b"step = 3", r"expected \[\[step\]\] tables"),
        (b"[[step]]\nratio = 2", "step 1: has no name"),
        (b"[[step]]\nname = 'quantise'", "did you mean 'quantize'"),
        (b"[[step]]\nname = 'quantize'\nbits = 4", "step 1: quantize has no setting 'bits'"),
        (b"[[step]]\nname = 'prune_weights'\nsparsity = 2", "step 1: sparsity: expected above 0"),
        (
            b"[[step]]\nname = 'prune_weights'\nsparsity = 'half'",
            "step 1: sparsity: expected a number, got 'half'",
        ),
        (b"[[step]]\nname = 'a'\n[[step]]\nname = 'b'", "step 1: .* step 2: "),
    ],
)
def test_recipes_that_cannot_be_read(user, paredown_cli, text, said):
    user()
    Path("own.toml").write_bytes(text)
    refused(paredown_cli(*RUN, "--recipe", "own.toml"), said)


def test_all_that_a_recipe_lacks_is_said_before_any_work(user, paredown_cli):
    user(changed(train="None", loss="None", validation="None"))
    Path("own.toml").write_text('[[step]]\nname = "fine_tune"\n[[step]]\nname = "quantize"\n')
    refused(
        paredown_cli(*RUN, "--recipe", "own.toml"),
        r"FineTune\(\): needs loss and train of the task",
        r"Quantize\(\): needs calibration of the task",
        "task: has no validation",
    )


def test_check_names_every_problem_at_once(user, paredown_cli):
    nan = f"TensorDataset({NAN}, torch.zeros(9, dtype=torch.long))"
    user(changed(train=nan, test="None", score="lambda out, y: 1.0"))
    Path("own.toml").write_text('[[step]]\nname = "quantise"\n')
    words = ("check", "net.py", "--runtime", "tensorfloe", "--recipe", "own.toml")
    code, out, err = paredown_cli(*words)
    assert (code, err) == (1, "")
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    said = ("own.toml", "no test", "examples of train hold NaN", "tensorfloe", "task.score")
    assert len(problems) == len(said), out
    assert all(any(words in line for line in problems) for words in said), out
    code, out, _ = paredown_cli(*words, "--json")
    assert code == 1 and len(json.loads(out)["problems"]) == len(said)


def test_check_goes_on_where_the_model_fails(user, paredown_cli):
    user("def model():\n    raise ValueError('no weights')\n" + changed(test="None"))
    code, out, _ = paredown_cli("check", "net.py")
    assert code == 1 and "no weights" in out and "task: has no test" in out
    code, out, _ = paredown_cli("check", "nowhere.py", "--json")
    assert code == 1 and json.loads(out)["problems"] == ["nowhere.py: no such file."]


# --- folders ---------------------------------------------------------------------------------


def test_folders_that_cannot_be_used(user, paredown_cli):
    user()
    paredown_cli("run", "net.py", "--size", "10MB", "--out", "first")
    code, _, err = paredown_cli("run", "net.py", "--seed", "1", "--out", "first")
    assert code == 1 and "seed: was 0, is now 1" in err
    assert "Choose another --out" in err
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("")
    code, _, err = paredown_cli("run", "net.py", "--out", "mine")
    assert code == 1 and "holds other files (thesis.tex)" in err
    with open("first/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = paredown_cli("run", "net.py", "--size", "10MB", "--out", "first")
    assert code == 1 and "another run (pid " in err and "is working in first" in err
    code, _, err = paredown_cli("run", "net.py", "--out", "net.py/r")
    assert code == 1 and "Not a directory" in err
    code, _, err = paredown_cli("run", "net.py", "--out", "/proc/paredown")
    assert code == 1 and "/proc/paredown: cannot be used" in err


def test_what_the_system_refuses_is_a_sentence(paredown_cli, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr(Run, "load", full)
    code, _, err = paredown_cli("report", "r")
    assert (code, err) == (1, "error: /tmp/x: No space left on device.\n")

    def none(*_):
        raise MemoryError

    monkeypatch.setattr(Run, "load", none)
    code, _, err = paredown_cli("report", "r")
    assert code == 1 and err.startswith("error: out of memory. Use a smaller batch_size")


def test_version(paredown_cli):
    code, out, _ = paredown_cli("--version")
    assert code == 0 and re.fullmatch(r"paredown \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("chosen", ["ACTIVE", None])
def test_threads_sleep_where_they_wait_but_not_in_what_is_timed(chosen):
    """Unless the user has chosen: OpenMP's threads spin by default."""
    source = """
import os, sys
from paredown import cli
sys.argv = ["paredown", "--version"]
try:
    cli.main()
except SystemExit:
    pass
from paredown.targets.devices import forks
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
    print(os.environ.get(name), forks.environment(1).get(name))
"""
    given = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    given |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    expected = [f"{chosen} {chosen}", "None None"] if chosen else ["PASSIVE None", "1000 None"]
    assert done.stdout.splitlines()[-2:] == expected


def test_code_that_ends_the_program_is_told(user, paredown_cli):
    user("old = task\ndef score(output, target):\n    sys.exit(0)\n")
    text = Path("net.py").read_text() + "\nimport sys\ndef task():\n    return old(score=score)\n"
    Path("net.py").write_text(text)
    code, _, err = paredown_cli("baseline", "net.py")
    assert code == 1 and "ended the program (sys.exit, with 0)" in err
    code, _, err = paredown_cli("baseline", "net.py", "--threads", "5000")
    assert code == 1 and "threads: expected a whole number from 1 to 1024, got 5000" in err
