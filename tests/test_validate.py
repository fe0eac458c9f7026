# ruff: noqa: F811 (fixtures are imported)
"""An artifact where it is to run: its golden set, its goals, other instruction sets, energy."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paredown.core.errors import UserError
from paredown.core.files import sha256
from paredown.core.task import Target
from paredown.graph.capture import capture
from paredown.measure import power, timing
from paredown.run import golden, validate, validate_isa
from paredown.run.golden import Agreement, Golden, compared
from paredown.run.validate_isa import Forced
from paredown.run.validate_words import verdict
from paredown.steps.quantization.quantize import Quantize
from paredown.targets.devices import device, local, probe, shell, ssh
from paredown.targets.devices.first import opened
from paredown.targets.runtimes import ready, source
from tests import sshd
from tests.test_run import INT8, NO_TRAIN, TINY, Here, here, paredown_cli, user  # noqa: F401
from tests.test_saturation import calibrated, convolutions

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with net.py and its finished run r, quantized to 8 bits; copied before use."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(device.DEVICES, "local", f"{__name__}:here_at")
        patch.setattr(torch, "set_num_threads", lambda _: None)
        patch.setattr(sys, "argv", ["paredown", *RUN])
        Path("net.py").write_text(f"{TINY}\n{NO_TRAIN}")
        Path("int8.toml").write_text(INT8)
        from paredown import cli

        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    return folder


RUN = ("run", "net.py", "--recipe", "int8.toml", "--size", "0.5x", "--out", "r", "--quiet")


def here_at(address):
    return Here


@pytest.fixture
def validated(made, tmp_path, monkeypatch, paredown_cli):
    """Call validate in a copy of the folder: exit code, its JSON, standard error."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")

    def call(*words, what="r"):
        code, out, err = paredown_cli("validate", what, "--rounds", 2, "--json", *words)
        return code, json.loads(out)["validations"] if out else [], " ".join(err.split())

    return call


def changed(path, change):
    """A JSON file with a change."""
    found = json.loads(Path(path).read_text())
    change(found)
    Path(path).write_text(json.dumps(found))


# --- runs ------------------------------------------------------------------------------------


def test_a_run_is_valid_where_it_was_made(validated):
    code, [found], _ = validated("--isa", "none")
    assert code == 0 and found["outcome"] == "passed" and not found["problem"]
    assert found["golden"] == {
        "examples": 32,
        "values": 128,
        "differing": 0,
        "max_error": 0.0,
        "db": None,
        "flips": 0,
    }
    before, after = found["measured"]["original"], found["measured"]["compressed"]
    assert after["size_bytes"] < 0.5 * before["size_bytes"] and after["split"] == "test"
    assert after["examples"] == 60 and after["energy_source"] == "unavailable"
    assert found["comparison"]["speedup"] > 2  # on `Here`, in proportion to the size
    assert [check["goal"] for check in found["checks"]] == ["size"]
    assert found["sha256"] == hashlib.sha256(Path("r/model.onnx").read_bytes()).hexdigest()
    assert json.loads(Path("r/validation-local.json").read_text())["outcome"] == "passed"
    page = Path("r/validation-local.html").read_text()
    assert "Passed here" in page and "The same bits in all 128 values of 32 examples" in page
    assert found["sha256"] in page and "Original and compressed" in page


def test_the_golden_set_is_what_the_artifact_gives(made):
    told = json.loads((made / "r/run.json").read_text())["details"]["golden"]
    assert told["examples"] == 32 and told["bytes"] == (made / "r/golden.npz").stat().st_size
    found = golden.read(made / "r/golden.npz", told["sha256"])
    assert len(found.inputs) == 32 and found.inputs[0][0].shape == (1, 1, 8, 8)
    with opened(made / "r/model.onnx", source("onnxruntime")) as predict:
        for [image], [output] in zip(found.inputs, found.outputs, strict=True):
            assert np.array_equal(predict(image)[0], output)


def test_a_missed_goal_ends_with_3(validated):
    changed("r/run.json", lambda run: run["goals"]["size"].update(value=0.01))
    code, [found], _ = validated("--isa", "none")
    assert code == 3 and found["outcome"] == "missed" and not found["checks"][0]["met"]
    assert "Not passed here" in Path("r/validation-local.html").read_text()


def test_other_outputs_end_with_3(validated):
    with np.load("r/golden.npz") as stored:
        arrays = dict(stored)
    arrays["outputs.0.0"] = -arrays["outputs.0.0"]
    np.savez("r/golden.npz", **arrays)
    code, _, err = validated("--isa", "none")
    assert code == 1 and "golden.npz: is damaged, or not the golden set of the run" in err
    found = sha256(Path("r/golden.npz").read_bytes())
    changed("r/run.json", lambda run: run["details"]["golden"].update(sha256=found))
    code, [found], _ = validated("--isa", "none")
    assert code == 3 and found["outcome"] == "missed"
    assert found["golden"]["differing"] == 4 and found["golden"]["flips"] == 1
    assert "the class of 1 of 32 examples flips" in Path("r/validation-local.html").read_text()


def test_a_device_that_fails_does_not_stop_the_others(validated, monkeypatch):
    monkeypatch.setattr(shell, "FIRST_PAUSES_S", ())
    there = ("--device", "ssh://root@nowhere.invalid", "--device", "local")
    code, [far, near], err = validated("--isa", "none", *there)
    assert code == 1 and far["outcome"] == "failed" and "no such host" in far["problem"]
    assert near["outcome"] == "passed" and "failed: device:" in err
    names = sorted(path.name for path in Path("r").glob("validation-*"))
    far = "validation-ssh-root-nowhere.invalid.json"
    assert names == ["validation-local.html", "validation-local.json", far]
    ssh.end()


def test_what_is_missing_is_told(validated):
    Path("net.py").unlink()
    code, [found], _ = validated("--isa", "none")
    assert code == 0 and found["measured"]["compressed"]["score"] is None
    assert found["measured"]["compressed"]["latency_ms_p50"] > 0
    assert any("name its file with --file" in note for note in found["notes"])
    Path("r/model.onnx").write_bytes(b"other")
    code, _, err = validated()
    assert code == 1 and "is damaged, or not the file of the run" in err
    code, _, err = validated(what="nowhere")
    assert code == 1 and "nowhere: no such file or folder" in err


def test_other_test_data_are_told(validated):
    text = Path("net.py").read_text().replace('"test": images(2)', '"test": images(3)')
    Path("net.py").write_text(text)
    _, [found], _ = validated("--isa", "none", "--file", "net.py")
    assert any("The test split is not the one of the run" in note for note in found["notes"])


def test_another_file_of_the_name_is_not_run(validated):
    Path("net.py").write_text("raise SystemExit('executed')\n")
    code, [found], err = validated("--isa", "none")
    assert code == 0 and found["measured"]["compressed"]["score"] is None
    assert "net.py: is not the file that the run was started from" in err and "executed" not in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "locl"), "device: 'locl' is not one of local, ssh"),
        (("--device", ""), "device: '' is not one of"),
        (("--threads", 0), "threads: expected"),
        (("--out", "net.py"), "net.py: is a file; expected a folder"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_measured(validated, words, told):
    code, found, err = validated(*words)
    assert code == 1 and not found and told in err
    assert not list(Path("r").glob("validation*"))


def test_a_single_file_is_held_against_what_there_is(validated):
    code, [found], _ = validated("--isa", "none", what="r/model.onnx")
    assert code == 0 and found["golden"]["differing"] == 0 and not found["checks"]
    assert Path("r/validation-local.html").is_file()
    Path("alone").mkdir()
    shutil.copy("r/model.onnx", "alone")
    code, _, err = validated(what="alone/model.onnx")
    assert code == 1 and "there is nothing to hold it against" in err
    code, [found], _ = validated("--file", "net.py", what="alone/model.onnx")
    assert code == 0 and found["golden"] is None
    assert found["measured"]["compressed"]["score"] > 0.9
    code, _, err = validated(what="net.py")
    assert code == 1 and "no runtime takes a file of that ending" in err
    code, [found], _ = validated("--runtime", "openvino", what="r/model.onnx")
    assert code == 1 and "for openvino give the run's folder" in found["problem"]


@pytest.mark.slow
def test_this_machine_and_another_address_give_the_same(made, tmp_path, monkeypatch, capsys):
    if sshd.missing():
        pytest.skip(sshd.missing())
    from paredown.run.validate import validate

    monkeypatch.chdir(made)
    with sshd.machine(tmp_path, sys.executable) as there:
        monkeypatch.setenv(shell.CONFIG, str(there.config))
        targets = [Target(device=url, rounds=2) for url in ("local", there.url)]
        _, [near, far] = validate("r", targets=targets, isa=["none"])
        ssh.end()
    assert not far.problem and far.golden == near.golden and not far.golden.differing
    assert far.outcome == near.outcome == "passed"
    assert far.measured["compressed"].where["device"] == there.url


# --- outputs ---------------------------------------------------------------------------------


def test_outputs_that_cannot_be_compared():
    one = [[np.float32([[1.0, 2.0]])]]
    other_shape = compared(one, [[np.float32([[1.0]])]])
    assert not other_shape.agrees and other_shape.max_error is None and other_shape.differing == 2
    nan = compared(one, [[np.float32([[1.0, np.nan]])]])
    assert not nan.agrees and nan.max_error is None and nan.db is None and nan.differing == 1
    both = [[np.float32([[1.0, np.nan]])]]
    assert compared(both, both).agrees and not compared(both, both).differing
    whole = [[np.int64([[1, 2]])]]
    assert compared(whole, whole).flips is None and compared(whole, whole).agrees
    assert compared(one, [[np.float32([[1.0, 2.001]])]]).agrees


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04 torn", b"\x93NUMPY"])
def test_a_golden_set_that_is_none(tmp_path, text):
    (tmp_path / "golden.npz").write_bytes(text)
    with pytest.raises(UserError, match="is no golden set"):
        golden.read(tmp_path / "golden.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="is no golden set: expected inputs"):
        golden.read(tmp_path / "other.npz")
    with pytest.raises(UserError, match="cannot be read"):
        golden.read(tmp_path / "gone.npz")


def test_an_instruction_set_with_other_results_is_a_miss():
    good, bad = Agreement(4, 8, 0, 0.0, None, 0), Agreement(4, 8, 8, 0.5, 12.0, 2)
    found = validate.Validation("local", "openvino", golden=good)
    assert found.outcome == "passed"
    forced = [Forced("AVX2", "how", bad), Forced("SSE41", "how", None, "crashed")]
    found = validate.Validation("local", "openvino", golden=good, instruction_sets=forced)
    assert found.outcome == "missed" and "Under AVX2 the file gives other results" in verdict(found)


def test_what_can_be_forced_is_what_the_processor_has(monkeypatch):
    monkeypatch.setattr(validate_isa, "_flags", lambda: {"sse4_1", "avx2", "avx512bw"})
    monkeypatch.setattr(shutil, "which", lambda _: None)
    names = [way.name for way in validate_isa.ways("openvino")]
    assert names == ["SSE41", "AVX2", "AVX512_CORE"] and not validate_isa.ways("onnxruntime")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert [way.name for way in validate_isa.ways("onnxruntime")] == ["Nehalem", "Haswell"]
    [way] = validate_isa.ways("openvino", ["avx2"])
    assert way.under.variables == (("ONEDNN_MAX_CPU_ISA", "AVX2"),)
    with pytest.raises(UserError, match="'vax' cannot be forced here for litert; expected Nehalem"):
        validate_isa.ways("litert", ["vax"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vnni", "safe"])
def test_files_differ_under_instruction_sets_as_is_declared(how, tmp_path):
    """OpenVINO's kernels without VNNI saturate; weights within 7 bits give the same everywhere."""
    ways = {way.name: way for way in validate_isa.ways("openvino")}
    if not {"AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"} <= ways.keys():
        pytest.skip("this processor has no AVX-512 with VNNI, so nothing can differ from it")
    images = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    model = capture(convolutions(), (images[:1],))
    file = ready("openvino").lower(
        Quantize(saturation=how).apply(model, calibrated(images)), tmp_path / "model.xml"
    )
    inputs = [[image[None].numpy()] for image in images]
    with opened(file, source("openvino")) as predict:
        outputs = [list(predict(*each)) for each in inputs]
    chosen = [ways[name] for name in ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI")]
    found = validate_isa.forced(file, "openvino", Golden(inputs, outputs), chosen)
    assert [each.agreement.agrees for each in found] == [how == "safe", how == "safe", True]


# --- energy ----------------------------------------------------------------------------------


def test_a_power_meter_is_integrated_over_the_timed_windows(tmp_path):
    path = tmp_path / "power.csv"
    path.write_text("Watts,note,Time\n10,a,100\n20,b,101\n20,c,102\n0,d,103\n")
    read = power.read(path)
    assert read.joules(100, 101) == pytest.approx(15)
    assert read.joules(100.5, 102.5) == pytest.approx(8.75 + 20 + 7.5)
    assert read.energy_mj([(100.0, 101.0, 10), (101.0, 102.0, 10)]) == pytest.approx(1750)
    assert read.energy_mj([(100.0, 101.0, 10), (102.5, 104.0, 10)]) is None  # beyond the end
    assert read.energy_mj([]) is None
    gap = power.Power(np.array([0.0, 1.0, 9.0, 10.0]), np.ones(4))
    assert gap.joules(0.2, 0.8) == pytest.approx(0.6) and gap.joules(0.5, 2.0) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got none"),
        ("time,volts\n1,2\n", "expected a CSV file with the columns time and watts, got time"),
        ("time,watts\n1,2\n", "expected at least 2 readings, got 1"),
        (
            "time,watts\n1,2\nyesterday,2\n",
            "line 3: expected a time and watts, 0 or more, got 'yesterday'",
        ),
        ("time,watts\n1\n", "line 2: expected a time and watts"),
        ("time,watts\n1,nan\n", "line 2"),
        ("time,watts\n1,5\n2,-5\n", "line 3: expected a time and watts, 0 or more"),
        ("time,watts\n\x00\xff", "is no CSV file"),
    ],
)
def test_a_record_that_is_none(tmp_path, text, told):
    path = tmp_path / "power.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=told):
        power.read(path)


def test_energy_of_a_power_meter_is_in_the_measurement(validated):
    Path("power.csv").write_text("time,watts\n0,2\n1,2\n")
    code, [found], _ = validated("--isa", "none", "--power-csv", "power.csv")
    assert code == 0 and found["measured"]["compressed"]["energy_source"] == "unavailable"
    assert any("readings do not span the time" in note for note in found["notes"])
    Path("power.csv").write_text(
        "time,watts\n" + "".join(f"{now},2\n" for now in range(LONG_AGO, LONG_AGO + 10))
    )
    windows = ((LONG_AGO + 1.0, LONG_AGO + 3.0, 100),)
    measured = {
        "compressed": validate.Measured(MEASUREMENT, torch.zeros(0), [], None, None, windows)
    }
    notes = []
    made = validate._metered(measured, power.read(Path("power.csv")), notes)["compressed"]
    assert made.measurement.energy_mj == pytest.approx(40) and not notes
    assert made.measurement.energy_source == "measured"
    code, _, err = validated("--power-csv", "none.csv")
    assert code == 1 and "none.csv: cannot be read" in err


LONG_AGO = 1_000_000
MEASUREMENT = validate.Measurement(1)


# --- what a device is like -------------------------------------------------------------------


def test_conditions_are_what_went_on_besides_this_process(monkeypatch):
    monkeypatch.setattr(probe.os, "sysconf", lambda _: 100)
    before = {"ns": 0, "own_s": 1.0, "ticks": 1000, "throttles": 4, "khz": None}
    after = {"ns": 2 * 10**9, "own_s": 2.5, "ticks": 1350, "throttles": 6, "khz": None}
    found = probe.conditions(before, after)
    assert found["others"] == pytest.approx(1.0) and found["throttles"] == 2
    assert found["seconds"] == 2 and "speed" not in found
    assert "others" not in probe.conditions(before | {"ticks": None}, after)


def test_a_device_tells_what_it_is_like(made):
    with local.Probe(made / "r/model.onnx", source("onnxruntime")) as child:
        told = child.describe()
        with np.load(made / "r/golden.npz") as stored:
            device.write_batches(made / "one.npz", [[stored["inputs.0.0"]]])
        child.time(made / "one.npz", 5)
        assert child.conditions["seconds"] > 0 and child.conditions["cores"] >= 1
    assert told["memory"].endswith(" GB") and float(told["load"]) >= 0
    assert all(told.values())


class Busy(Here):
    """A device on which other programs are busy in its first rounds."""

    busy = 0

    def time(self, inputs, count, warmup=0):
        Busy.busy -= 1
        others = 1.9 if Busy.busy > 0 else 0.1
        self.conditions = {"seconds": 1.0, "cores": 2.0, "others": others, "throttles": 0.0}
        return super().time(inputs, count, warmup)


def busy_at(address):
    return Busy


@pytest.mark.parametrize(("calls", "disturbed"), [(0, 0), (4, 0), (1000, 5)])
def test_disturbed_rounds_are_timed_again(made, monkeypatch, calls, disturbed):
    monkeypatch.setitem(device.DEVICES, "local", f"{__name__}:busy_at")
    monkeypatch.setattr(Busy, "busy", calls)
    batches = [golden.read(made / "r/golden.npz").inputs[0]]
    found = timing.interleaved({"a": made / "r/model.onnx"}, Target(), batches, 5)["a"]
    assert len(found.rounds) == len(found.disturbances) == 5
    assert len(found.energies_mj) == len(found.windows) == 10
    assert sum(map(bool, found.disturbances)) == disturbed
