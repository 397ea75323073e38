"""The engines that bench.py measures: minicls, transformers, ONNX Runtime, vLLM and a harness, behind the same methods.

An engine is made from a model directory, with the weights in one dtype, and answers rows of token ids. A single row is
one request; each engine batches several rows in its own way. Only minicls scores options of more than one token.
"""

import contextlib
import functools
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import minicls
from minicls import cascade, dist, scorer, weights
from minicls.attention import Layout, attention
from minicls.bert import BertSelfAttention
from minicls.config import UserError, flag_of
from minicls.generate import generate
from minicls.predict import Reader, classify_rows


class Engine:
    """A model in one library. It has a `version`, a `device`, and the methods that go with its head:

    classify(rows)                            log-probabilities (n, C) fp32 of the classes
    score(rows, options)                      log-probabilities (n, O) fp32 of each option's tokens after each row
    generate(rows, max_new_tokens, stop_ids)  the greedy continuation of each row, up to a stop id and without it
    """

    concurrent = False  # whether several threads may call it at once

    @property
    def peak_memory_bytes(self) -> int | None:
        """Peak memory of this process so far; None if it is unknown."""
        return dist.peak_memory_bytes(self.device)

    def forget(self) -> None:
        """Empties caches of earlier rows, so that the same question costs the same again."""

    def warm_up(self, texts: list[str]) -> None:
        """Warms up what answering the texts may not reach."""

    def close(self) -> None:
        """Ends the processes that the engine started."""


def is_classifier(directory: Path) -> bool:
    """Whether a model directory holds a classification head rather than a language model."""
    return weights.read_config(directory)["architectures"][0].endswith("ForSequenceClassification")


def only_tokens(options: list[list[int]]) -> list[int]:
    """The one token of each option. Raises UserError if an option has several."""
    if any(len(option) > 1 for option in options):
        raise UserError("--engines: an option has several tokens, which only minicls can score; leave the others out")
    return [option[0] for option in options]


def before_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:end])


PACKED_WEIGHTS: list[torch.ScriptObject] = []  # of every Int8Linear


def int8_linear(x: torch.Tensor, layer: int, out_features: int) -> torch.Tensor:
    """PyTorch's product with int8 weights, as an operator that torch.compile need not look into.

    x: (N, in_features) fp32; layer: index into PACKED_WEIGHTS. x is rounded to 8 bits with one scale for all of it.
    Returns (N, out_features) fp32.
    """
    return torch.ops.quantized.linear_dynamic(x, PACKED_WEIGHTS[layer])


# torch.library.custom_op is shorter, but its checks at each call cost as much as a small product.
LIBRARY = torch.library.Library("minicls", "DEF")
LIBRARY.define("int8_linear(Tensor x, int layer, int out_features) -> Tensor")
LIBRARY.impl("int8_linear", int8_linear, "CPU")


@torch.library.register_fake("minicls::int8_linear")
def _(x, layer, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


class Int8Linear(torch.nn.Module):
    """Linear layers that share an input, as one int8 product on a CPU, with a scale for each output column."""

    def __init__(self, *linears: torch.nn.Linear):
        super().__init__()
        weight = torch.cat([linear.weight.detach().float() for linear in linears])  # (out, in)
        bias = torch.cat([linear.bias.float() for linear in linears])  # (out,)
        # CPUs without VNNI add pairs of products in 16 bits, which overflow if both factors have 8 bits. The weights
        # get 7: a scale for each column makes up for the lost bit.
        scales = weight.abs().amax(1).clamp(min=1e-12).double() / 63  # (out,)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.layer, self.out_features = len(PACKED_WEIGHTS), len(bias)
        PACKED_WEIGHTS.append(torch.ops.quantized.linear_prepack(quantized, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.minicls.int8_linear(x, self.layer, self.out_features)


class Int8SelfAttention(torch.nn.Module):
    """BERT's self-attention with one int8 product for queries, keys and values."""

    def __init__(self, layer: BertSelfAttention):
        super().__init__()
        self.num_attention_heads = layer.num_attention_heads
        self.query_key_value = Int8Linear(layer.query, layer.key, layer.value)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        q, k, v = self.query_key_value(x).unflatten(1, (3, self.num_attention_heads, -1)).unbind(1)  # (N, H, Dh)
        return attention(q, k, v, layout).flatten(1)  # (N, D)


class Minicls(Engine):
    """The packed forward pass of evaluation, the scorer, and greedy decoding with a cache."""

    version = minicls.__version__

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, compile: bool = False, int8: bool = False
    ):
        """`int8`: BERT's linear layers, but not the heads, in PyTorch's int8 on a CPU."""
        config = weights.read_config(directory)
        architecture = weights.ARCHITECTURES[config["architectures"][0]]
        model, _, _ = weights.build_model(architecture, config, directory, 0, device, dtype)
        if architecture is weights.BERT:  # heads compute in fp32
            model.bert.pooler.float(), model.classifier.float()
        self.model, self.device = model.eval().requires_grad_(False), device
        if int8:
            for layer in self.model.bert.encoder.layer:
                layer.attention.self = Int8SelfAttention(layer.attention.self)
                for part in (layer.attention.output, layer.intermediate, layer.output):
                    part.dense = Int8Linear(part.dense)
            self.version += ", int8"
        if compile:
            # The layers of a decoder share a graph, which compiles in seconds. BERT is one graph with constant weights
            # (`bench.side_process`): it takes a minute or more, but a CPU packs such weights for its products.
            torch._dynamo.config.recompile_limit = 64  # one for each kind of batch: single, padded, cached, last layer
            for module in [self.model] if architecture is weights.BERT else self.model.model.layers:
                module.compile(dynamic=True)
            self.version += ", compiled"
        self.forget()

    def classify(self, rows: list[list[int]]) -> torch.Tensor:
        return classify_rows(self.model, rows, self.device).log_softmax(1)

    def score(self, rows: list[list[int]], options: list[list[int]]) -> torch.Tensor:
        # A single request shares a prefix with no other row, so use the one it has in common with the previous request.
        if not (self.prefix and self.prefix.begins(rows)):
            self.prefix = scorer.read_prefix(self.model, [*rows, *self.previous], self.device)
        self.previous = rows[-1:]
        return scorer.score(self.model, rows, options, self.device, "sum", prefix=self.prefix)

    def generate(self, rows: list[list[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        return generate(self.model, rows, max_new_tokens, stop_ids, self.device)

    def forget(self) -> None:
        self.prefix: scorer.Prefix | None = None
        self.previous: list[list[int]] = []


class Text(list):
    """A row of ids that keeps its text, which another model tokenizes in its own way."""

    def __init__(self, ids: list[int], text: str):
        super().__init__(ids)
        self.text = text


class CascadeEngine(Engine):
    """minicls with two models: a BERT classifies, and defers to a larger model where it is unsure (cascade.py)."""

    def __init__(self, small: Minicls, large: Minicls, readers: tuple[Reader, Reader], threshold: float):
        self.small, self.large, self.threshold = small, large, threshold
        self.readers, self.device = readers, small.device
        self.version = f"{small.version}, threshold {threshold:.3f}"

    def encode(self, texts: list[str]) -> list[Text]:
        return [Text(ids, text) for ids, text in zip(self.readers[0].rows(texts), texts, strict=True)]

    def classify(self, rows: list[Text]) -> torch.Tensor:
        answers = self.small.classify(rows)  # (n, C)
        large = functools.partial(answer_by, self.large, self.readers[1])
        cascade.defer(answers, self.threshold, [row.text for row in rows], large)
        return answers

    def warm_up(self, texts: list[str]) -> None:
        """Asks the large model as well: the small one may be sure of all warm-up texts."""
        answer_by(self.large, self.readers[1], texts)

    def forget(self) -> None:
        self.large.forget()


def answer_by(engine: Minicls, reader: Reader, texts: list[str]) -> torch.Tensor:
    """The log-probabilities (n, C) fp32 of the classes, or of the options of a language model."""
    rows = reader.rows(texts)
    if reader.architecture is weights.DECODER:
        return engine.score(rows, reader.chat.options)
    return engine.classify(rows)


class Padded(Engine):
    """An engine that sorts rows by length and pads them, in batches of `batch_size`, with `pad_token_id`."""

    def _batches(self, rows: list[list[int]], side: str) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Indices of rows, and their ids (B, T) and attention mask (B, T), padded on one side."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = [torch.tensor(rows[row]) for row in batch]
            input_ids, mask = pad(ids, padding_value=self.pad_token_id), pad([torch.ones_like(row) for row in ids])
            yield batch, {"input_ids": input_ids.to(self.device), "attention_mask": mask.to(self.device)}


class Transformers(Padded):
    """transformers' own models and `generate` with its default attention."""

    logits_to_keep = 1  # positions that a score computes logits for, counted from the end; 0: all of them

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, batch_size: int = 32):
        import transformers

        head = "SequenceClassification" if is_classifier(directory) else "CausalLM"
        auto_model = getattr(transformers, f"AutoModelFor{head}")
        self.version, self.device, self.batch_size = transformers.__version__, device, batch_size
        self.model = auto_model.from_pretrained(directory, dtype=dtype).eval().to(device)
        self.pad_token_id = self.model.config.pad_token_id or 0

    @torch.inference_mode()
    def classify(self, rows: list[list[int]]) -> torch.Tensor:
        log_probabilities = torch.zeros(len(rows), self.model.config.num_labels)
        for batch, padded in self._batches(rows, "right"):
            log_probabilities[batch] = self.model(**padded).logits.float().log_softmax(1).cpu()
        return log_probabilities

    @torch.inference_mode()
    def score(self, rows: list[list[int]], options: list[list[int]]) -> torch.Tensor:
        tokens, log_probabilities = only_tokens(options), torch.zeros(len(rows), len(options))
        for batch, padded in self._batches(rows, "left"):
            positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
            few = {"use_cache": False, "logits_to_keep": self.logits_to_keep}
            logits = self.model(**padded, position_ids=positions, **few).logits
            # One position costs little in fp32. All positions stay in the dtype of the weights, as in a harness.
            logits = logits.float() if self.logits_to_keep else logits
            log_probabilities[batch] = logits.log_softmax(-1)[:, -1, tokens].float().cpu()
        return log_probabilities

    @torch.inference_mode()
    def generate(self, rows: list[list[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in rows]
        stop = {"eos_token_id": list(stop_ids) or None, "pad_token_id": 0}
        for batch, padded in self._batches(rows, "left"):
            ids = self.model.generate(**padded, max_new_tokens=max_new_tokens, do_sample=False, **stop)
            for row, new_ids in zip(batch, ids[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
                answers[row] = before_stop(new_ids, stop_ids)
        return answers


class Harness(Transformers):
    """Scores one-token options as lm-evaluation-harness does: one forward pass per question, with all logits."""

    logits_to_keep = 0

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device):
        super().__init__(directory, dtype, device, batch_size=1)
        self.version = f"transformers {self.version}"


def export_onnx(directory: Path, file: Path, int8: bool) -> None:
    """Writes transformers' model of a BERT classifier to an ONNX file, with ONNX Runtime's fused operators.

    Inputs: input_ids and attention_mask (B, T), int64. Output: logits (B, C), fp32. `int8`: quantize the weights of
    the matrix products, and at run time their inputs.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import AutoModelForSequenceClassification

    # The fusions know the graph that tracing makes of "eager" attention. They do not match torch.export's graph, nor
    # that of scaled_dot_product_attention, and what they leave unfused runs as many small operators.
    attention = {"attn_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32, **attention).eval()
    inputs, ones = ["input_ids", "attention_mask"], torch.ones(2, 8, dtype=torch.int64)
    names = {"input_names": inputs, "output_names": ["logits"]}
    names["dynamic_axes"] = {name: {0: "batch", 1: "length"} for name in inputs}
    torch.onnx.export(model, (ones, ones), file, dynamo=False, **names)
    heads_and_width = model.config.num_attention_heads, model.config.hidden_size
    optimize_model(str(file), "bert", *heads_and_width).save_model_to_file(str(file))
    if int8:
        # As in Int8Linear, the weights get 7 bits (reduce_range), so that all CPUs give the same answers, and each
        # output column gets a scale. The embeddings cost no time and stay in fp32.
        options = {"per_channel": True, "reduce_range": True, "op_types_to_quantize": ["MatMul", "Attention"]}
        untyped = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # shape inference does not know the fused operators
        quantize_dynamic(file, file, extra_options=untyped, **options)


class OnnxRuntime(Padded):
    """A BERT classifier in ONNX Runtime on the CPU, in fp32 or int8, on as many threads as PyTorch uses."""

    def __init__(self, directory: Path, device: torch.device, int8: bool = False, batch_size: int = 32):
        import onnxruntime

        self.version, self.device, self.batch_size = onnxruntime.__version__ + ", int8" * int8, device, batch_size
        self.pad_token_id = weights.read_config(directory).get("pad_token_id") or 0
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # The export runs in a process of its own, because it needs more memory than the session.
        spawn = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as process:
            file = Path(folder) / "model.onnx"
            process.submit(export_onnx, directory, file, int8).result()
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def classify(self, rows: list[list[int]]) -> torch.Tensor:
        log_probabilities = torch.zeros(len(rows), self.session.get_outputs()[0].shape[1])
        for batch, padded in self._batches(rows, "right"):
            (logits,) = self.session.run(None, {name: tensor.numpy() for name, tensor in padded.items()})
            log_probabilities[batch] = torch.from_numpy(logits).log_softmax(1)
        return log_probabilities


def _vllm_arguments(directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, eager: bool) -> dict:
    """vLLM's settings, under the names that its LLM class and, with dashes, its server's flags share."""
    runner = "pooling" if is_classifier(directory) else "generate"
    # By default vLLM takes nearly the whole card, of which a desktop or bench.py itself may use a part.
    share = {"gpu_memory_utilization": 0.6} if device.type == "cuda" else {}
    model = {"model": str(directory), "dtype": str(dtype).removeprefix("torch."), "runner": runner}
    return model | {"max_model_len": max_length, "enforce_eager": eager} | share


def vllm_environment(threads: int) -> dict[str, str]:
    """Environment variables for a process that imports vLLM; a GPU ignores the first three."""
    # For a fair figure on a CPU: all cores, a few GiB of KV cache, and the engine in *this* process, without
    # multiprocessing. Otherwise throughput halves.
    cpu = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    cpu |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return cpu | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class VLLM(Engine):
    """vLLM's engine in this process, which needs `vllm_environment` from its start."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, eager: bool = False):
        """`max_length`: tokens of a row and its answer; `eager`: skip torch.compile, which takes most of a minute."""
        import vllm

        self.version, self.device = vllm.__version__, device
        self.llm = vllm.LLM(**_vllm_arguments(directory, dtype, device, max_length, eager))
        self.parameters = functools.partial(vllm.SamplingParams, temperature=0, detokenize=False)

    def _ask(self, method: str, rows: list[list[int]], *parameters) -> list:
        return getattr(self.llm, method)([{"prompt_token_ids": list(ids)} for ids in rows], *parameters, use_tqdm=False)

    def classify(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([answer.outputs.probs for answer in self._ask("classify", rows)]).log()

    def score(self, rows: list[list[int]], options: list[list[int]]) -> torch.Tensor:
        tokens = only_tokens(options)
        answers = self._ask("generate", rows, self.parameters(max_tokens=1, logprob_token_ids=tokens))
        first = [answer.outputs[0].logprobs[0] for answer in answers]
        return torch.tensor([[logprobs[token].logprob for token in tokens] for logprobs in first])

    def generate(self, rows: list[list[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        parameters = self.parameters(max_tokens=max_new_tokens, ignore_eos=True, stop_token_ids=list(stop_ids))
        answers = self._ask("generate", rows, parameters)
        return [before_stop(answer.outputs[0].token_ids, stop_ids) for answer in answers]

    @property
    def peak_memory_bytes(self) -> int | None:
        """None on a GPU, where vLLM reserves memory in advance."""
        return None if self.device.type == "cuda" else super().peak_memory_bytes

    def forget(self) -> None:
        self.llm.reset_prefix_cache()


class VLLMServer(Engine):
    """vLLM's HTTP server in a process of its own. It batches the requests of several threads by itself."""

    concurrent = True

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, eager: bool = False):
        import vllm

        self.version, self.device = vllm.__version__, device
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        flags = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        for name, value in _vllm_arguments(directory, dtype, device, max_length, eager).items():
            flag = flag_of(name)
            flags += [flag] * value if isinstance(value, bool) else [flag, str(value)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
        self.process = subprocess.Popen(command, stdout=2, env=env)  # to stderr: standard output is for results
        try:
            self._wait_for_server()
        except BaseException:  # also for Ctrl-C: the caller has no engine to close yet
            self.close()
            raise

    def _wait_for_server(self) -> None:
        while self.process.poll() is None:
            try:
                self._send("GET", "/health")
                return
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
        raise RuntimeError(f"vLLM's server ended with code {self.process.returncode}")

    def _send(self, verb: str, path: str, **body) -> dict:
        content = json.dumps({"model": "model"} | body) if body else None
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request(verb, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"vLLM's server answered {response.status}: {text[:200]}")
        return json.loads(text) if text else {}

    def _complete(self, row: list[int], **parameters) -> dict:
        return self._send("POST", "/v1/completions", prompt=row, temperature=0, **parameters)["choices"][0]

    def classify(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([self._send("POST", "/classify", input=row)["data"][0]["probs"] for row in rows]).log()

    def score(self, rows: list[list[int]], options: list[list[int]]) -> torch.Tensor:
        tokens = only_tokens(options)
        parameters = {"logprobs": 1, "logprob_token_ids": tokens, "return_tokens_as_token_ids": True}
        answers = [self._complete(row, max_tokens=1, **parameters)["logprobs"]["top_logprobs"][0] for row in rows]
        return torch.tensor([[logprobs[f"token_id:{token}"] for token in tokens] for logprobs in answers])

    def generate(self, rows: list[list[int]], max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        stop = {"ignore_eos": True, "stop_token_ids": list(stop_ids), "return_token_ids": True}
        answers = [self._complete(row, max_tokens=max_new_tokens, **stop)["token_ids"] for row in rows]
        return [before_stop(ids, stop_ids) for ids in answers]

    @property
    def peak_memory_bytes(self) -> int | None:
        """Resident memory of the server's processes, each at its peak; None on a GPU, where it is unknown."""
        if self.device.type == "cuda":
            return None
        processes, total = [str(self.process.pid)], 0
        while processes:
            pid = processes.pop()
            with contextlib.suppress(OSError):  # a process that has ended meanwhile
                total += dist.resident_peak_bytes(pid)
                for children in Path(f"/proc/{pid}/task").glob("*/children"):
                    processes += children.read_text().split()
        return total

    def forget(self) -> None:
        if not self._send("POST", "/reset_prefix_cache").get("success", True):
            raise RuntimeError("vLLM's server did not empty its prefix cache")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def uses_gpu(device: str | None) -> bool:
    return (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")


def process_environment(engine: str, device: str | None, threads: int | None) -> tuple[dict[str, str], str | None]:
    """The environment variables of a process that measures one engine, and the --device for it."""
    env = dict(os.environ)
    if uses_gpu(device):  # show one GPU only: the HF Trainer would use all that it sees, and vLLM the first one
        visible = (env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        index = torch.device(device or "cuda").index or 0
        if index < len(visible) and visible[index]:  # otherwise the process itself reports the mistake
            env["CUDA_VISIBLE_DEVICES"], device = visible[index], "cuda"
    # `dist.start` lowers these for minicls' batches; other libraries keep PyTorch's default.
    if not engine.startswith("minicls"):
        env |= {name: "1024" for name in dist.CPU_CACHES if env.get(name) in (None, dist.CPU_CACHE_CAPACITY)}
    return env | (vllm_environment(threads or os.cpu_count()) if engine == "vllm" else {}), device


def make_engine(
    name: str, directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, compile: bool, server: bool
) -> Engine:
    """The engine of this name with the model of a directory; `server`: vLLM's, in a process of its own.

    Raises UserError if it is not installed.
    """
    arguments = directory, dtype, device
    try:
        if name == "minicls":
            return Minicls(*arguments, compile)
        if name == "vllm":
            return (VLLMServer if server else VLLM)(*arguments, max_length)
        if name == "minicls-int8":
            return Minicls(directory, torch.float32, device, compile, int8=True)
        if name.startswith("onnxruntime"):
            return OnnxRuntime(directory, device, int8=name.endswith("-int8"))
        return (Harness if name == "harness" else Transformers)(*arguments)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); install it or leave it out") from None
