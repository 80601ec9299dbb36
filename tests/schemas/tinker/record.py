"""Records what a version of Tinker's SDK sends, and what it makes of results, with its own classes.

It runs in an environment that has the SDK alone, and needs nothing of loray: `python record.py FOLDER` writes
FOLDER/VERSION.json. The server that it starts answers just enough for one round of each request.
"""

from __future__ import annotations

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import tinker
from tinker import types
from tinker.proto import tinker_public_pb2 as messages

TOKENS = [5, 6, 7, 8]
LOGPROBS = [-0.5, -1.5, -2.5]
SESSION = "session-0123456789abcdef"
sent: dict[str, str] = {}


def fields(array: Any) -> bytes:
    return np.asarray(array, "<f4").tobytes()


def output() -> bytes:
    message = messages.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = message.loss_fn_outputs.add(num_datums=2)
    record.fields["logprobs"].data = fields([*LOGPROBS, -3.5])
    record.fields["logprobs"].offsets = np.array([0, 12, 16], "<i8").tobytes()
    record.fields["logprobs"].dtype = messages.DTYPE_FLOAT32
    message.metrics["loss:sum"] = 8.0
    return message.SerializeToString(deterministic=True)


def sample() -> bytes:
    message = messages.SampleResponse(prompt_logprobs=fields([np.nan, -1.0]), prompt_cache_hit_tokens=1)
    message.sequences.add(
        stop_reason=messages.STOP_REASON_LENGTH,
        tokens=np.array([7, 8], "<i4").tobytes(),
        logprobs=fields([-0.25, -0.5]),
    )
    return message.SerializeToString(deterministic=True)


ANSWERS: dict[str, Any] = {
    "client/config": {"use_pyqwest_transport": False, "proto_compress_fwdbwd": False},
    "client/dynamic_config": {},
    "create_session": {"session_id": SESSION},
    "create_model": {"request_id": "model"},
    "load_weights": {"request_id": "load"},
    "get_info": {"model_data": {"model_name": "base"}, "model_id": f"{SESSION}:train:0"},
    "forward_backward": {"request_id": "pass"},
    "optim_step": {"request_id": "step"},
    "save_weights": {"request_id": "save"},
    "save_weights_for_sampler": {"request_id": "sampler"},
    "asample": {"request_id": "sample", "sample_sequence_ids": ["sample.0"]},
    "weights_info": {"base_model": "base", "is_lora": True, "lora_rank": 8},
    "session_heartbeat": {},
    "telemetry": {"status": "accepted"},
}
RESULTS: dict[str, Any] = {
    "model": {"model_id": f"{SESSION}:train:0"},
    "load": {"path": "tinker://x/weights/one"},
    "step": {"metrics": {}},
    "save": {"path": f"tinker://{SESSION}:train:0/weights/one"},
    "sampler": {"sampling_session_id": f"{SESSION}:sample:0"},
    "pass": output(),
    "sample": sample(),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.removeprefix("/api/v1/")
        is_question = path == "retrieve_future"
        answer = RESULTS[json.loads(body)["request_id"]] if is_question else ANSWERS.get(path, {})
        if path not in ("telemetry", "session_heartbeat"):
            sent.setdefault(path, base64.b64encode(body).decode())
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf" if isinstance(answer, bytes) else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        raw = json.dumps({"sampler_id": "x", "base_model": "base"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


def datums() -> list[types.Datum]:
    of = types.ModelInput.from_ints
    return [
        types.Datum(
            model_input=of(TOKENS[:-1]),
            loss_fn_inputs={"target_tokens": TOKENS[1:], "logprobs": LOGPROBS, "advantages": [1.0, -1.0, 0.5]},
        ),
        types.Datum(
            model_input=of(TOKENS[:1]), loss_fn_inputs={"target_tokens": [9], "logprobs": [0.0], "advantages": [2.0]}
        ),
    ]


def now(value: Any) -> Any:
    return value.result() if hasattr(value, "result") else value


def main(folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    service = tinker.ServiceClient(base_url=f"http://127.0.0.1:{server.server_port}", api_key="tml-recorded")
    client = now(service.create_lora_training_client(base_model="base", rank=8))
    passed = now(client.forward_backward(datums(), "ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.25}))
    now(client.optim_step(types.AdamParams(learning_rate=1e-3)))
    now(client.save_state("one"))
    sampler = now(client.save_weights_and_get_sampling_client())
    sampled = now(
        sampler.sample(
            prompt=types.ModelInput.from_ints(TOKENS[:2]),
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=2, stop=["\n"], temperature=0.5),
            include_prompt_logprobs=True,
        )
    )
    now(service.create_training_client_from_state_with_optimizer(f"tinker://{SESSION}:train:0/weights/one"))
    recorded = {
        "sent": sent,
        "output": base64.b64encode(output()).decode(),
        "sample": base64.b64encode(sample()).decode(),
        "read": {
            "logprobs": [list(map(float, row["logprobs"].data)) for row in passed.loss_fn_outputs],
            "metrics": dict(passed.metrics),
            "tokens": list(map(int, sampled.sequences[0].tokens)),
            "stop_reason": sampled.sequences[0].stop_reason,
        },
    }
    path = folder / f"{tinker.__version__}.json"
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
