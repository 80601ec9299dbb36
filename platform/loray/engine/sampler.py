"""From logits to tokens. Each request has its own generator, so its draw does not depend on the batch.

Shapes: S sampled requests, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loray.engine.request import Request, TokenLogprobs
from loray.spec import SamplingParams

_GREEDY_BELOW = 1e-5  # a softmax so sharp is an argmax, and dividing by less overflows


class Sampler:
    """The one owner of the requests' generators."""

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}

    def forget(self, request: Request) -> None:
        self._generators.pop(request.request_id, None)

    def __call__(self, logits_SV: Tensor, requests: list[Request]) -> list[tuple[int, TokenLogprobs | None]]:
        """One token for each row; log-probabilities where asked for, of the unchanged logits."""
        greedy = logits_SV.argmax(dim=-1).tolist()
        out = []
        for i, request in enumerate(requests):
            params = request.spec.params
            logits_V = logits_SV[i]
            if params.presence_penalty or params.frequency_penalty:
                logits_V = penalised(logits_V, request.output_ids, params)
                greedy[i] = int(logits_V.argmax())
            token = greedy[i] if params.temperature < _GREEDY_BELOW else self._draw(logits_V, request)
            out.append((token, _logprobs(logits_SV[i], token, params.logprobs)))
        return out

    def _draw(self, logits_V: Tensor, request: Request) -> int:
        probabilities_V = distribution(logits_V, request.spec.params).cpu()
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator(request)))

    def _generator(self, request: Request) -> torch.Generator:
        generator = self._generators.get(request.request_id)
        if generator is None:
            generator = torch.Generator()
            seed = request.spec.params.seed
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed % (1 << 63))
            self._generators[request.request_id] = generator
        return generator


def penalised(logits_V: Tensor, output_ids: list[int], params: SamplingParams) -> Tensor:
    """OpenAI's penalties: logit − frequency · count − presence · [count > 0], over the tokens generated so far."""
    if not output_ids:
        return logits_V
    ids, counts = torch.unique(torch.tensor(output_ids, device=logits_V.device), return_counts=True)
    logits_V = logits_V.clone()
    logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return logits_V


def distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities after temperature, top-k, top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024), in turn."""
    logits_V = logits_V.float()
    logits_V = (logits_V - logits_V.max()) / params.temperature
    if params.top_k and params.top_k < logits_V.shape[0]:
        floor = torch.topk(logits_V, params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, float("-inf"))
    if params.top_p < 1:
        ordered_V, order_V = logits_V.sort(descending=True)
        p_V = ordered_V.softmax(dim=-1)
        beyond_V = p_V.cumsum(dim=-1) - p_V >= params.top_p  # the mass before a token has reached top_p already
        logits_V = logits_V.masked_fill(beyond_V.scatter(0, order_V, beyond_V), float("-inf"))
    probabilities_V = logits_V.softmax(dim=-1)
    if params.min_p:
        kept_V = probabilities_V * (probabilities_V >= params.min_p * probabilities_V.max())
        probabilities_V = kept_V / kept_V.sum()
    return probabilities_V


def _logprobs(logits_V: Tensor, token: int, num_top: int | None) -> TokenLogprobs | None:
    if num_top is None:
        return None
    logprobs_V = logits_V.log_softmax(dim=-1)
    top = torch.topk(logprobs_V, num_top) if num_top else None
    best = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else ()
    return TokenLogprobs(float(logprobs_V[token]), best)
