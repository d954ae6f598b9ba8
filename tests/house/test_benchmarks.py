# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The benchmark harness: its registry, its processes, and above all that it refuses what may not be quoted."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GREEN = {
    "command": "pytest tests/dora", "exit": 0, "passed": 360, "failed": 0, "source": "feedfacefeedface", "gpu": "Some GPU",
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("registry", "rows", "verify", "run", "table", "plot", "measure", "steps", "losses")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def row():
    return {
        "case": "c1",
        "implementation": "dora-triton",
        "round": 0,
        "run": "2026-01-01T00:00:00Z",
        "commit": "0123456789ab",
        "source": "feedfacefeedface",
        "tests": GREEN,
        "device": "Some GPU",
        "versions": {"torch": "2", "triton": "3", "transformers": "5", "peft": "0.21.2+triton.1"},
        "prediction_ms": 90.0,
        "p20_ms": 99.0,
        "p50_ms": 100.0,
        "p80_ms": 101.0,
        "times_ms": [99.0, 100.0, 101.0],
        "peak_mib": 5000.0,
        "losses": [10.4, 10.3],
    }


def test_a_sound_row_may_be_quoted(bench, row):
    assert bench("verify").faults(row, [row]) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tests": None}, "no tests ran"),
        ({"tests": {**GREEN, "exit": 1, "failed": 1}}, "not green"),
        ({"tests": {**GREEN, "passed": 0}}, "not green"),
        ({"tests": {**GREEN, "passed": 9}}, "at least 100"),
        ({"tests": {**GREEN, "command": "pytest tests/house"}}, "not those of tests/dora"),
        ({"tests": {**GREEN, "source": "0" * 16}}, "other sources"),
        ({"tests": {**GREEN, "gpu": None}}, "ran on the CPU"),
        ({"tests": {**GREEN, "gpu": "Another GPU"}}, "not on Some GPU"),
        ({"p50_ms": 98.0}, "p20 <= p50"),
        ({"p50_ms": None}, "p50_ms is None"),
        ({"peak_mib": "much"}, "peak_mib is 'much'"),
        ({"losses": [10.4, float("nan")]}, "not finite"),
        ({"case": "c99"}, "not in the registry"),
        ({"implementation": "magic"}, "not in the registry"),
    ],
)
def test_a_row_that_may_not_be_quoted_is_refused(bench, row, change, fault):
    found = bench("verify").faults({**row, **change}, [row])
    assert fault in "; ".join(found)


def test_a_row_that_trained_otherwise_than_upstream_is_refused(bench, row):
    upstream = {**row, "implementation": "upstream-dora", "tests": None}
    assert bench("verify").faults(row, [row, upstream]) == []
    astray = {**row, "losses": [10.4, 10.1]}
    assert "differ from upstream-dora" in "; ".join(bench("verify").faults(astray, [astray, upstream]))
    elsewhere = {**upstream, "run": "2026-01-02T00:00:00Z", "losses": [1.0, 1.0]}
    assert bench("verify").faults(row, [row, elsewhere]) == []


@pytest.fixture
def curves():
    falling = [7.0 - i / 250 for i in range(500)]
    training = {"losses": falling, "seconds": 9.0, "device": "Some GPU", "versions": {"torch": "2", "peft": "0.21.2"}}
    return {
        "run": "2026-01-01T00:00:00Z",
        "commit": "0123456789ab",
        "source": "feedfacefeedface",
        "precision": "bf16",
        "implementation": "dora-triton",
        "trainings": {"dora-triton": training, "upstream-dora": {**training, "losses": [x + 1e-4 for x in falling]}},
    }


def test_sound_curves_are_quoted_and_drawn(bench, curves, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "losses-some-gpu.jsonl"
    bench("rows").append(curves, path)
    assert bench("verify").faults_of_curves(curves) == []
    assert "over 500 steps" in bench("table").sentence_of(path) and "1.0e-04 in bf16" in bench("table").sentence_of(
        path
    )
    assert bench("plot").draw(path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda losses: [x + 6e-4 for x in losses], "more than 5e-04"),
        (lambda losses: [*losses, 1.0], "differ in length"),
        (lambda losses: [*losses[1:], float("nan")], "not finite"),
        (lambda losses: [7.0] * 500, "nothing was learnt"),
    ],
)
def test_curves_that_may_not_be_quoted_are_refused(bench, curves, change, fault, tmp_path):
    upstream = curves["trainings"]["upstream-dora"]
    upstream["losses"] = change(curves["trainings"]["dora-triton"]["losses"])
    assert fault in "; ".join(bench("verify").faults_of_curves(curves))
    path = tmp_path / "losses-some-gpu.jsonl"
    bench("rows").append(curves, path)
    assert bench("table").sentence_of(path) is None


def test_curves_of_one_training_are_refused(bench, curves):
    del curves["trainings"]["upstream-dora"]
    assert "trainings of dora-triton" in "; ".join(bench("verify").faults_of_curves(curves))
    assert "precision 'fp4'" in "; ".join(bench("verify").faults_of_curves({**curves, "precision": "fp4"}))


@pytest.mark.parametrize("doctored", [{}, {"p50_ms": 1.0}, {"tests": None}])
def test_verify_exits_with_an_error_for_a_refused_row(bench, row, monkeypatch, tmp_path, capsys, doctored):
    path = tmp_path / "some-gpu.jsonl"
    bench("rows").append({**row, **doctored}, path)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(path)])
    assert bench("verify").main() == bool(doctored)
    assert ("REFUSED some-gpu.jsonl:1 c1 dora-triton" in capsys.readouterr().out) == bool(doctored)


def test_nothing_is_measured_where_the_tests_are_not_green(bench, monkeypatch, tmp_path, capsys):
    """run.py --verify runs them for real, and stops."""
    run = bench("run")
    failing = tmp_path / "test_fails.py"
    failing.write_text("def test_no():\n    assert False\n", encoding="utf-8")
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["run.py", "--verify", "--tests", str(failing), "--output", str(output)])
    monkeypatch.setattr(run, "waiting", lambda *arguments: pytest.fail("measured"))
    assert run.main() == 1 and not output.exists()
    assert "not measured: the tests are not green (1 failed)" in capsys.readouterr().err


def test_goals_are_judged_within_a_run(bench, row):
    registry, verify = bench("registry"), bench("verify")
    goal = next(goal for goal in registry.GOALS if goal.case == "c1" and goal.implementation == "dora-triton")
    lora = {**row, "implementation": "upstream-lora", "p50_ms": 150.0, "peak_mib": 5100.0}
    assert verify.check_goal(goal, {"dora-triton": row}) is None
    assert verify.check_goal(goal, {"dora-triton": row, "upstream-lora": lora})[0]
    slow, large = {**row, "p50_ms": 120.0}, {**row, "peak_mib": 5200.0}
    assert not verify.check_goal(goal, {"dora-triton": slow, "upstream-lora": lora})[0]
    assert not verify.check_goal(goal, {"dora-triton": large, "upstream-lora": lora})[0]


def test_rounds_are_joined_and_older_runs_left_out(bench, row):
    rows = bench("rows")
    old = {**row, "run": "2025-01-01T00:00:00Z", "p50_ms": 1.0}
    rounds = [
        {**row, "round": i, "p50_ms": time, "peak_mib": 5000.0 + i} for i, time in enumerate((103.0, 100.0, 900.0))
    ]
    joined = rows.latest_runs([old, *rounds])["c1"]["dora-triton"]
    assert (joined["p50_ms"], joined["peak_mib"], joined["rounds"]) == (103.0, 5002.0, 3)


def test_times_are_compared_within_a_round(bench, row):
    rows = bench("rows")

    def joined(times):
        return rows.join_rounds([{**row, "round": i, "p50_ms": time} for i, time in times.items()])

    assert rows.time_ratio(joined({0: 60.0, 1: 90.0, 2: 200.0}), joined({0: 100.0, 1: 200.0, 2: 250.0})) == 0.6
    assert rows.time_ratio(joined({0: 60.0}), joined({1: 80.0})) == 0.75  # no round in common


def test_rows_survive_the_file_and_bad_lines_are_named(bench, row, tmp_path):
    rows = bench("rows")
    path = tmp_path / "some-gpu.jsonl"
    rows.append(row, path)
    rows.append(row, path)
    assert rows.read(path) == [row, row]
    path.write_text(path.read_text("utf-8") + "{half a li", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        rows.read(path)


def test_registry_is_sound(bench):
    registry = bench("registry")
    assert {"c1", "c2", "c3", "c4", "c5", "m1", "70b", "d1", "d2", "d3"} <= set(registry.CASES)
    for case in registry.CASES.values():
        assert case.widths.hidden % case.widths.heads == 0
        assert set(case.targets) <= set(case.widths.linears())
        for name in registry.implementations_of(case):
            prediction = registry.predict_ms(case, registry.IMPLEMENTATIONS[name])
            assert prediction is None or prediction > 0
    for goal in registry.GOALS:
        named = {goal.implementation, goal.against} - {None}
        assert named <= set(registry.implementations_of(registry.CASES[goal.case]))


def test_predictions_grow_with_the_work(bench):
    registry = bench("registry")
    case = registry.CASES["c1"]
    floor, lora, dora = (
        registry.predict_ms(case, registry.IMPLEMENTATIONS[name]) for name in ("floor", "lora", "dora-triton")
    )
    assert floor < lora < dora
    wide = registry.predict_ms(registry.CASES["c3"], registry.IMPLEMENTATIONS["dora-triton"])
    assert dora < wide
    longer = dataclasses.replace(case, seq=2 * case.seq)
    assert registry.predict_ms(longer, registry.IMPLEMENTATIONS["floor"]) > 1.9 * floor


def test_the_table_quotes_rows_and_invents_none(bench, row, tmp_path):
    table, rows = bench("table"), bench("rows")
    path = tmp_path / "some-gpu.jsonl"
    rows.append({**row, "tests": None}, path)
    assert table.table_of(path) is None
    rows.append(row, path)
    rows.append({**row, "implementation": "upstream-lora", "p50_ms": 125.0, "p80_ms": 126.0}, path)
    text = table.table_of(path)
    assert "100 / 5,000 (0.80×)" in text
    assert "125 / 5,000" in text


def test_the_plot_draws_what_may_be_quoted(bench, row, tmp_path):
    pytest.importorskip("matplotlib")
    plot, rows = bench("plot"), bench("rows")
    path = tmp_path / "some-gpu.jsonl"
    rows.append({**row, "tests": None}, path)
    assert plot.draw(path) is None
    rows.append(row, path)
    assert plot.draw(path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["d1", "d2", "d3"])
def test_predictions_without_a_backward_pass(bench, name):
    """A decoded token takes as long as its weights are read; half a byte an element takes a quarter of two."""
    registry = bench("registry")
    floor, ours = (
        registry.predict_ms(registry.CASES[name], registry.IMPLEMENTATIONS[implementation])
        for implementation in ("floor", "dora-triton")
    )
    assert 0.1 < floor < ours < 20
    if name == "d2":
        assert floor < 0.5 * registry.predict_ms(registry.CASES["d1"], registry.IMPLEMENTATIONS["floor"])


def test_each_page_quotes_its_cases(bench, row, tmp_path):
    table, rows = bench("table"), bench("rows")
    path = tmp_path / "some-gpu.jsonl"
    for case, implementation in (("c1", "dora-triton"), ("c4", "dora-triton-graph"), ("d1", "dora-triton")):
        rows.append({**row, "case": case, "implementation": implementation}, path)
    texts = {page.name: table.table_of(path, quoted) or "" for page, quoted in table.PAGES.items()}
    assert [name in texts["inference.md"] for name in ("c1:", "c4:", "d1:")] == [False, False, True]
    assert [name in texts["torch_compile.md"] for name in ("c1:", "c4:", "d1:")] == [False, True, False]
    assert "c1:" in texts["README.md"] and "d1:" not in texts["README.md"]


@pytest.mark.parametrize("case", ["tiny-decode-x2", "tiny-prefill"])
def test_steps_without_a_backward_pass(bench, case):
    """Every step is the same, and the two bodies of DoRA agree on it; the floor has no adapter."""
    measure, registry = bench("measure"), bench("registry")
    case = dataclasses.replace(registry.CASES[case], warm=1, steps=2)
    source = Path(measure.__file__).parents[1] / "src"
    found = {}
    for name in ("lora", "dora") if case.adapters > 1 else ("lora", "dora", "floor"):
        row = measure.measure(case, registry.IMPLEMENTATIONS[name], source)
        assert len(row["times_ms"]) == 2 and len(set(row["losses"])) == 1
        found[name] = row["losses"][0]
    assert len(set(found.values())) == len(found)


def test_processes_measure_ours_in_turn(bench):
    run = bench("run")
    waiting = run.waiting("tiny-mlp", ["lora", "dora"], sys.executable)
    assert all(process.process.poll() is None for process in waiting.values())
    waiting["lora"].kill()
    row = waiting["dora"].finish(timeout=300)
    with pytest.raises(run.MeasurementError, match=r"measure.py tiny-mlp lora .*exit code -9"):
        waiting["lora"].finish(timeout=300)
    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert row["versions"]["peft"] == "0.21.2+triton.1"
    assert row["losses"] == sorted(row["losses"], reverse=True), "the fixed batch is learnt step by step"


def test_a_process_that_fails_or_is_left_alone_says_so(bench):
    run = bench("run")
    left = run.waiting("tiny-mlp", ["lora"], sys.executable)["lora"]
    left.process.stdin.close()
    left.process.stdin = None
    with pytest.raises(run.MeasurementError, match="give this process its turn"):
        left.finish(timeout=300)
    with pytest.raises(run.MeasurementError, match="invalid choice"):
        run.start("measure.py", ["no-case", "lora"], "ours", sys.executable)


def test_tests_are_taken_over_for_the_same_sources_alone(bench, tmp_path, monkeypatch):
    run, rows = bench("run"), bench("rows")
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    path = tmp_path / "rows.jsonl"
    tests = {"source": run.source_digest(), "gpu": None, "exit": 0, "passed": 100}
    rows.append({"tests": tests}, path)
    for other in ({"source": "0" * 16}, {"gpu": "NVIDIA"}, {"exit": 1}):
        rows.append({"tests": {**tests, **other}}, path)
    assert run.tests_of(path) == tests
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=r"--tested .*use --verify"):
        run.tests_of(path)


def test_a_process_with_the_wrong_package_stops(bench):
    measure, registry = bench("measure"), bench("registry")
    import peft

    ours = Path(peft.__file__).resolve().parents[1]
    assert measure.versions_of(registry.IMPLEMENTATIONS["dora"], ours)["peft"] == peft.__version__
    with pytest.raises(RuntimeError, match="wants the peft of upstream"):
        measure.versions_of(registry.IMPLEMENTATIONS["upstream-lora"], ours)
    with pytest.raises(RuntimeError, match="wants the peft of ours"):
        measure.versions_of(registry.IMPLEMENTATIONS["lora"], BENCHMARKS)
