"""Requests per second of minicls, transformers and vLLM on the same rows and weights.

    python bench.py --bert RUN --qwen RUN --qwen-linear RUN          # trained runs: their answers are compared as well
    python bench.py --init random --bert bert-base-cased --qwen Qwen3-0.6B --data synthetic  # published sizes, no files
    python bench.py --init random --qwen DIR --data DIR              # a model's config and tokenizer, no weights
    python bench.py --qwen RUN --mode server --rate 4 --slo-ms 500   # requests that arrive at random times
    python bench.py --qwen RUN --engines minicls harness             # against scoring as an evaluation harness does it
    python bench.py --bert RUN --engines minicls minicls-int8 onnxruntime onnxruntime-int8     # int8
    python bench.py --bert RUN --qwen-linear RUN --then RUN          # and a cascade: if unsure, --bert defers

A row of the table is one model, engine, method and mode. Methods: `classify` with a linear head, `score` all options in
one forward pass, `generate` the answer token by token, `cascade` with two models. Each engine runs in processes of its
own, one after another. Rows go to bench.json as they are measured, and at the end into a table and rps.png. The
measurements and their reasons:

- Closed loop. `single` sends a request when the previous one is answered, `offline` sends all at once. That measures
  capacity, but it flatters: a client that waits for an answer sends less to an engine that stalls.
- Open loop. In `server`, requests are due at random times (a Poisson process of --rate), as from independent users.
  Latency counts from the time a request was *due*. Counted from the time the engine took it, it would leave out the
  wait behind a slow request, which is where an overloaded server loses its time.
- p99, not the mean. Most requests are quick, and a mean hides the few that are not. A user who sends a hundred requests
  meets the p99 once. In `server`, --slo-ms adds the fraction of requests that were answered in time.
- Answers are checked, because it is easy to be fast and wrong. The reference is minicls in fp32: in bf16, rounding may
  decide a near tie either way. All changed answers are counted, and a row is invalid if one changed although the two
  best options are more than a MARGIN apart. Random weights have only log-probabilities to compare.
- Tokenization is timed for every engine. Warm-up uses texts of the training split, because engines cache prompts: if
  the timed texts were used, a prefix cache would answer from memory.

A shared machine is noisy: figures are medians over --rounds, and ratios within one command are the most reliable.
"""

import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minicls import cascade, checkpoint, dist, engines, plots, serving, weights
from minicls.comparison import bench_table
from minicls.config import DataSettings, UserError, command_line, flag_of, parse, run_main, setting, write_json
from minicls.data import Data, Split, load_data, stratified_rows
from minicls.predict import Reader
from minicls.tiny import SIZES

ENGINES = ("minicls", "transformers", "vllm", "harness", "minicls-int8", "onnxruntime", "onnxruntime-int8")
ONLY = {"harness": ("qwen", "score", "scores options")}  # engines for one model and one of its methods
OWN_DTYPES = {"minicls-int8": "int8", "onnxruntime": "fp32", "onnxruntime-int8": "int8"}  # instead of --dtype
ONLY |= dict.fromkeys(OWN_DTYPES, ("bert", "classify", "runs BERT classifiers"))
MODES = ("single", "offline", "server")
DATA_FLAGS = ("text_column", "label_column", "label_names", "test_size")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ARCHITECTURES = {"bert": weights.BERT, "qwen": weights.DECODER, "qwen_linear": weights.DECODER_LINEAR}
METHODS = {"bert": ("classify",), "qwen": ("generate", "score"), "qwen_linear": ("classify",), "then": ("cascade",)}
ROW = "ROW "  # marks the output lines of a side that are rows, since engines print as well
COLUMNS = ("model", "engine", "engine_version", "method", "mode", "dtype", "threads", "device", "requests_per_second")
COLUMNS += ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "input_tokens_per_second", "peak_memory_bytes")
COLUMNS += (*serving.UNKNOWN, "num_requests", "status", "reason")


@dataclass(frozen=True)
class Settings:
    """All engines get the same rows."""

    bert: str | None = setting(None, "finished run of train_bert.py, directory or hub id", group="models and data")
    qwen: str | None = setting(None, "finished run of train_qwen.py, directory or hub id")
    qwen_linear: str | None = setting(None, "finished run of train_qwen.py --head linear, directory or hub id")
    then: str | None = setting(None, "larger run to defer to where --bert is unsure: a cascade, in minicls")
    threshold: float | None = setting(
        None, "confidence up to which texts are deferred; unset: chosen on validation rows", minimum=0, maximum=1
    )
    init: str = setting(
        "pretrained",
        f"random: fresh weights; a model is then a directory with config and tokenizer, or one of {', '.join(SIZES)}",
        choices=("pretrained", "random"),
    )
    data: str | None = setting(None, "hub id, directory or synthetic; unset: as the run read it, or AG News")
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels")
    label_names: tuple[str, ...] | None = setting(None, "class names in the order of their indices")
    test_size: float = setting(0.0, "training rows (below 1: a fraction) to test on without a test split", minimum=0)
    max_length: int = setting(512, "tokens of a row", minimum=3)
    max_new_tokens: int = setting(8, "tokens of a generated answer", minimum=1)
    engines: tuple[str, ...] | None = setting(
        None, "unset: whichever of the first three are installed", choices=ENGINES, group="measurement"
    )
    mode: tuple[str, ...] = setting(("single", "offline"), "one at a time, all at once, at random times", choices=MODES)
    num_requests: int = setting(64, "requests of a row; if the test rows are fewer, they are sent again", minimum=1)
    min_seconds: float = setting(10.0, "minimum seconds of a row in the modes single and offline", minimum=0)
    rate: float = setting(2.0, "requests that arrive per second in mode server", minimum=1e-3)
    slo_ms: float = setting(1000.0, "latency target of a request in mode server", minimum=0)
    rounds: int = setting(3, "processes of each engine; figures are medians over them", minimum=1)
    seed: int = setting(42, "seeds arrivals in mode server, and random weights", minimum=0)
    device: str | None = setting(None, "cpu, cuda or cuda:N; unset: cuda if there is one", group="machine")
    threads: int | None = setting(None, "CPU threads of each engine; unset: torch's choice", minimum=1)
    dtype: str = setting("bf16", "dtype of weights, except in the int8 and onnxruntime engines", choices=tuple(DTYPES))
    compile: bool = setting(False, "torch.compile minicls' model")
    vllm_python: str | None = setting(None, "Python of an environment that has vLLM; unset: this one")
    output_dir: str | None = setting(None, "directory of bench.json, new or empty; unset: runs/bench-<time>")
    side: str | None = setting(None, "measure one engine, in this process, as the comparison does", choices=ENGINES)


def check_flags(s: Settings) -> None:
    """Raises UserError for a flag that the chosen models, engines and modes would ignore."""
    for engine in filter(ONLY.get, s.engines):
        role, _, only = ONLY[engine]
        if not getattr(s, role):
            raise UserError(f"--engines: {engine} only {only}; add {flag_of(role)} RUN or leave it out")
        if engine in OWN_DTYPES and engines.uses_gpu(s.device):
            raise UserError(f"--engines: {engine} runs only on a CPU; add --device cpu or leave it out")
    closed_loop, server = {"single", "offline"} & {*s.mode}, "server" in s.mode
    able = {role: [engine for engine in ENGINES if methods(role, engine)] for role in METHODS}
    # Flag: whether anything uses it, and the flags that would.
    used_by = {role: ({*able[role]} & {*s.engines}, f"--engines {' or '.join(able[role])}") for role in METHODS}
    used_by |= dict.fromkeys(DATA_FLAGS, (s.data not in (None, "synthetic"), "--data DIR"))
    used_by |= {
        "dtype": ({*s.engines} - {*OWN_DTYPES}, f"--engines {' or '.join(e for e in ENGINES if e not in OWN_DTYPES)}"),
        "max_new_tokens": (s.qwen and {*s.engines} - {*ONLY}, "--qwen with an engine other than harness"),
        "min_seconds": (closed_loop, "--mode single or offline"),
        "rate": (server, "--mode server"),
        "slo_ms": (server, "--mode server"),
        "seed": (server or s.init == "random", "--mode server or --init random"),
        "then": (s.bert and s.init == "pretrained" and "minicls" in s.engines, "--bert RUN with --engines minicls"),
        "threshold": (s.then, "--then RUN"),
        "compile": ({"minicls", "minicls-int8"} & {*s.engines}, "--engines minicls"),
        "vllm_python": ("vllm" in s.engines, "--engines vllm"),
    }
    for name, (used, others) in used_by.items():
        if not used and getattr(s, name) != getattr(Settings, name):
            raise UserError(f"{flag_of(name)}: used only by {others}; add that or leave the flag out")


def find_model(s: Settings, role: str) -> Path:
    """The directory of the model that a role's flag names."""
    return weights.find_model(getattr(s, role), flag=flag_of(role))[0]


def models(s: Settings) -> dict[str, Path]:
    return {role: find_model(s, role) for role in METHODS if getattr(s, role)}


def methods(role: str, engine: str) -> tuple[str, ...]:
    """The methods of a role's model that an engine has."""
    if role == "then" and engine != "minicls":
        return ()
    return tuple(method for method in METHODS[role] if (role, method) == ONLY.get(engine, (role, method))[:2])


def requests(s: Settings, data: Data) -> Split:
    """The test rows whose texts are sent as requests."""
    return data.test.select(stratified_rows(data.test, min(s.num_requests, len(data.test))))


# A side: a process that measures one model in one engine.


def side_process(s: Settings, side: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a side's process."""
    env, device = engines.process_environment(side, s.device, s.threads)
    if side.startswith("minicls") and s.compile and s.bert and not (s.then or engines.uses_gpu(device)):
        # Constant weights: a CPU packs them for its matrix products.
        env["TORCHINDUCTOR_FREEZING"] = "1"
    python = s.vllm_python if side == "vllm" and s.vllm_python else sys.executable
    side_settings = replace(s, side=side, device=device, output_dir=None, vllm_python=None)
    return [python, __file__, *command_line(asdict(side_settings))], env


def start_side(s: Settings, side: str) -> Iterator[dict]:
    """Yields the rows of one process as they come; raises UserError with its last line of stderr if it fails."""
    command, env = side_process(s, side)
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": env}
    try:
        with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stderr=errors, **pipes) as process:
            try:
                yield from (json.loads(line.removeprefix(ROW)) for line in process.stdout if line.startswith(ROW))
            except BaseException:  # for example Ctrl-C, here or in the code that uses the rows
                process.terminate()
                raise
            if process.wait():
                errors.seek(0)
                lines = errors.read().strip().splitlines() or ["no message"]
                raise UserError(lines[-1].removeprefix("error: ")[:300])
    except OSError as error:
        raise UserError(f"{command[0]} does not start ({error.strerror})") from None


def measure_side(s: Settings, data: Data) -> None:
    """Measures the one model that is named, or --bert and --then, and prints a row for each mode and method."""
    # Exit through `finally`, because a server must not outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    device = dist.start(s.device, s.threads, OWN_DTYPES.get(s.side, s.dtype))
    *smaller, (role, directory) = models(s).items()
    reader = Reader(directory, s.max_length)
    max_length = reader.max_length + (s.max_new_tokens if role == "qwen" else 0)
    arguments = directory, DTYPES[s.dtype], device, max_length, s.compile, s.mode == ("server",)
    engine = engines.make_engine(s.side, *arguments)
    if role == "then":
        ((_, bert),) = smaller
        small, readers = engines.make_engine(s.side, bert, *arguments[1:]), (Reader(bert, s.max_length), reader)
        engine = engines.CascadeEngine(small, engine, readers, s.threshold)
    texts = requests(s, data).texts
    try:
        for mode, method in itertools.product(s.mode, methods(role, s.side)):
            row = {"method": method, "mode": mode}
            try:
                row |= serving.measure_row(s, reader, engine, method, mode, texts, data.train.texts)
            except Exception as error:  # engines fail in many ways, and the next method may work
                row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(ROW + json.dumps(row), flush=True)
    finally:
        engine.close()


# The comparison: one table from all processes.


def reference(reader: Reader, directory: Path, device: torch.device, texts: list[str]) -> np.ndarray:
    """The log-probabilities (n, C) of classes or options by minicls in fp32, which all engines are checked against."""
    answers = engines.answer_by(engines.Minicls(directory, torch.float32, device), reader, texts)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # leave the memory to the sides, above all to vLLM
    return answers.double().numpy()


def compare(s: Settings, data: Data) -> tuple[list[dict], Path]:
    """Measures every model in every engine; returns the rows and the directory of bench.json, which grows with them."""
    device = dist.start(s.device, s.threads, s.dtype if {*s.engines} - {*OWN_DTYPES} else None)
    test, directories = requests(s, data), models(s)
    print(f"texts: {len(test)} test rows of {s.data}", file=sys.stderr)
    readers = {role: Reader(directory, s.max_length) for role, directory in directories.items()}
    for role, reader in readers.items():
        model = f"{flag_of(role)}: {getattr(s, role)}"
        if reader.architecture is not ARCHITECTURES.get(role, reader.architecture):
            names = [name for name, value in weights.ARCHITECTURES.items() if value is ARCHITECTURES[role]]
            raise UserError(f"{model} is a {reader.config['architectures'][0]}; pass a {' or '.join(names)}")
        if tuple(reader.label_names) != tuple(data.label_names):
            fault = f"was trained on other classes than {s.data} has ({', '.join(data.label_names)[:80]})"
            raise UserError(f"{model} {fault}; pass the --data, and if need be the --label-names, of its training")
    output_dir = checkpoint.new_run_dir(s.output_dir, "bench")
    write_json(output_dir / "bench.json", [])
    expected = {role: reference(readers[role], directories[role], device, test.texts) for role in readers}
    near = {}
    if s.then:
        near["then"] = np.abs(expected["bert"].max(1) - np.log(max(s.threshold, 1e-9))) < serving.MARGIN
        unsure = cascade.unsure(torch.from_numpy(expected["bert"]), s.threshold).numpy()
        expected["then"] = np.where(unsure[:, None], expected["then"], expected["bert"])
    machine = {"threads": torch.get_num_threads(), "device": dist.device_name(device)}
    rounds: dict[tuple, list[dict]] = {}

    def add_row(role: str, engine: str, row: dict) -> None:
        label, name = role.replace("_", "-"), Path(getattr(s, role)).name
        if role == "then":
            label, name = "cascade", f"{Path(s.bert).name}, {name}"
        dtype = OWN_DTYPES.get(engine, s.dtype)
        verdict = serving.UNKNOWN | {"status": "failed", "reason": row.get("failed")}
        if "failed" not in row:
            verdict = serving.judge(row, expected[role], test.labels, replace(s, dtype=dtype), near.get(role, False))
        names = {"model": name if name == label else f"{label}: {name}", "engine": engine, "dtype": dtype}
        values = machine | row | verdict | names
        columns = COLUMNS + ("slo_attainment",) * (row["mode"] == "server")
        same_rows = rounds.setdefault((role, engine, row["method"], row["mode"]), [])
        same_rows.append({column: values.get(column) for column in columns})
        write_json(output_dir / "bench.json", [*map(serving.median_row, rounds.values())])
        print(f"{values['model']}, {engine}, {row['method']}, {row['mode']}: {verdict['status']}", file=sys.stderr)

    for _, role, engine in itertools.product(range(s.rounds), readers, s.engines):
        # vLLM's server runs in its own process, and its parent must not hold a second copy of the model.
        in_process = tuple(mode for mode in s.mode if mode != "server" or engine != "vllm")
        for modes in filter(None, (in_process, tuple(mode for mode in s.mode if mode not in in_process))):
            kept = ("bert", "then") if role == "then" else (role,)
            one_model = replace(s, mode=modes, **{other: None for other in METHODS if other not in kept})
            missing = dict.fromkeys(itertools.product(methods(role, engine), modes))
            try:
                for row in start_side(one_model, engine) if missing else ():
                    missing.pop((row["method"], row["mode"]))
                    add_row(role, engine, row)
            except UserError as error:
                for method, mode in missing:
                    add_row(role, engine, {"method": method, "mode": mode, "failed": str(error)})
    return [*map(serving.median_row, rounds.values())], output_dir


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, argv, __doc__)
    named = [role for role in METHODS if getattr(s, role)]
    if not named:
        sizes = "--init random --bert bert-base-cased"
        raise UserError(f"--bert: no model is named; pass --bert, --qwen or --qwen-linear RUN, or {sizes}")
    if s.side and len(named) > 1 and named != ["bert", "then"]:
        raise UserError(f"--side: {s.side} measures one model; name only one")
    if not s.side:
        if s.engines is None:
            can_start = {"vllm"} if s.vllm_python else set()
            can_start |= {engine for engine in ENGINES[:3] if importlib.util.find_spec(engine)}
            s = replace(s, engines=tuple(engine for engine in ENGINES[:3] if engine in can_start))
            if absent := [engine for engine in ENGINES[:3] if engine not in can_start]:
                print(f"not installed, so not measured: {', '.join(absent)}")
        check_flags(s)
        checkpoint.check_output_dir(s.output_dir)
        if s.then and s.threshold is None:
            validation = cascade.validation_answers(find_model(s, "bert"), find_model(s, "then"))
            s = replace(s, threshold=cascade.choose_threshold(validation))
    if s.data is None:
        trained = [role for role in named if s.init == "pretrained" or getattr(s, role) not in SIZES]
        settings = [checkpoint.info_of_model(find_model(s, role))["settings"] for role in trained]
        of_run = next((values for values in settings if values.get("data")), {"data": DataSettings.data})
        kept = {name: of_run[name] for name in ("data", *DATA_FLAGS) if name in of_run}
        s = replace(s, **{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()})
    data = load_data(s.data, s.text_column, s.label_column, s.label_names, test_size=s.test_size)
    if s.side:
        return measure_side(s, data)
    with tempfile.TemporaryDirectory() as folder:
        for role in named if s.init == "random" else ():
            arguments = ARCHITECTURES[role], data.train.texts, data.label_names, s.seed, Path(folder) / role
            s = replace(s, **{role: str(weights.save_random_model(getattr(s, role), *arguments, flag_of(role)))})
        rows, output_dir = compare(s, data)
    print(bench_table(rows))
    print(f"{output_dir / 'bench.json'}, {plots.plot_requests(rows, output_dir / 'rps.png')}")


if __name__ == "__main__":
    run_main(main)
