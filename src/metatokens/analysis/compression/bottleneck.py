"""The variational information bottleneck as a stack of heads, one a seed: encoder, prior and decoder.

Paper section 5. Deviation: the encoder is a network with one hidden layer; the paper does not describe its own. It
gives the mean and deviation of a diagonal Gaussian q(z|x), softplus keeps the deviation positive, the decoder is
linear. Deviation: the prior r(z) of the information bottleneck is learned, one diagonal Gaussian or a mixture, where
the paper has N(0, I).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metatokens.analysis.compression.heads import (
    Array,
    Fit,
    LabelledStates,
    Parameters,
    Split,
    cross_entropies,
    draw_batches,
    draw_normal,
    fit_stack,
    init_linear,
    linear,
    stack_generators,
)
from metatokens.config.analysis import MixturePrior, RateDistortionConfig

MINIMUM_SCALE = 1e-4
"""Added to the deviation of a code, so that no rate is infinite."""
VALIDATION_CODES = 2
"""Codes drawn for a state of the validation part."""


class Reached(NamedTuple):
    """What a stack of heads reaches, in nats; G heads, n test states."""

    rates: Array
    """(G, n)"""
    distortions: Array
    """(G, n)"""
    train_rates: Array
    """(G,)"""


class BottleneckStack:
    """The heads of one state, without their parameters, which are passed in and returned.

    Args:
        labelled: all states.
        split: of the states.
        config: sizes and training.
        seed: of first weights, batches and noise; head i draws the same whatever the number of heads.
    """

    def __init__(self, labelled: LabelledStates, split: Split, config: RateDistortionConfig, *, seed: int) -> None:
        self._config, self._seed, self._num_classes = config, seed, labelled.num_classes
        states, classes = labelled.standardized(split.train), torch.from_numpy(labelled.classes)
        self._train, self._validation, self._test = (
            (states[rows], classes[rows]) for rows in (split.train, split.validation, split.test)
        )
        self._batch_generators = self._generators("batches")
        # the same noise at every look and beta, so that a change is one of the weights
        noise = self._generators("validation")
        self._validation_noise = draw_normal(noise, VALIDATION_CODES, len(split.validation), config.code_size)

    def init_parameters(self) -> Parameters:
        """Return first weights, (G, ...) each."""
        config, generators = self._config, self._generators("weights")
        layers = {
            "hidden": (self._train[0].shape[1], config.hidden_size),
            "code": (config.hidden_size, 2 * config.code_size),
            "decoder": (config.code_size, self._num_classes),
        }
        parameters: Parameters = {}
        for name, (inputs, outputs) in layers.items():
            parameters[f"{name}.weight"], parameters[f"{name}.bias"] = init_linear(generators, inputs, outputs)
        if isinstance(config.prior, MixturePrior):
            shape = (config.prior.num_components, config.code_size)
            # apart from one another, or they would stay equal
            parameters["prior.mean"] = draw_normal(generators, *shape)
            parameters["prior.logits"] = torch.zeros(config.num_seeds, shape[0])
        else:
            shape = (1, config.code_size)
            parameters["prior.mean"] = torch.zeros(config.num_seeds, *shape)
        parameters["prior.log_scale"] = torch.zeros(config.num_seeds, *shape)
        return parameters

    def fit(self, parameters: Parameters, beta: float) -> Fit:
        """Train on D + beta R, starting from these parameters; draws the next batches of the stack."""
        config, generators = self._config, self._batch_generators
        states, classes = self._train

        def batch_loss(current: Parameters) -> Tensor:
            rows = draw_batches(generators, len(states), config.batch_size)
            noise = draw_normal(generators, config.batch_size, config.code_size)
            mean, scale = encode(current, states[rows])
            rates, distortions = rate_and_distortion(current, mean, scale, mean + scale * noise, classes[rows])
            return (distortions + beta * rates).mean(1)

        def validation_loss(current: Parameters) -> Tensor:
            mean, scale = encode(current, self._validation[0])
            losses = []
            for noise in self._validation_noise.unbind(1):
                rates, distortions = rate_and_distortion(
                    current, mean, scale, mean + scale * noise, self._validation[1]
                )
                losses.append((distortions + beta * rates).mean(1))
            return torch.stack(losses).mean(0)

        return fit_stack(parameters, batch_loss, validation_loss, config)

    @torch.no_grad()
    def measure(self, parameters: Parameters) -> Reached:
        """Return what the heads reach on the test part, with the same noise for every beta."""
        generators = self._generators("test")
        rates, distortions = self._sample(parameters, *self._test, generators)
        train_rates, _ = self._sample(parameters, *self._train, generators)
        reached = rates.mean(0), distortions.mean(0), train_rates.mean((0, 2))
        return Reached(*(value.double().numpy() for value in reached))

    def _sample(
        self, parameters: Parameters, states: Tensor, classes: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return the rates of states and the distortions of their sampled codes, (samples, G, n) each."""
        mean, scale = encode(parameters, states)
        drawn = []
        for _ in range(self._config.num_code_samples):
            codes = mean + scale * draw_normal(generators, *mean.shape[1:])
            drawn.append(rate_and_distortion(parameters, mean, scale, codes, classes))
        rates, distortions = zip(*drawn, strict=True)
        return torch.stack(rates), torch.stack(distortions)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return stack_generators(self._config.num_seeds, seed=self._seed, purpose=purpose)


def encode(parameters: Parameters, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of q(z|x), (G, n, k) each, of states (G, n, C) or (n, C)."""
    hidden = functional.gelu(linear(states, parameters["hidden.weight"], parameters["hidden.bias"]))
    mean, spread = linear(hidden, parameters["code.weight"], parameters["code.bias"]).chunk(2, -1)
    return mean, functional.softplus(spread) + MINIMUM_SCALE


def rate_and_distortion(
    parameters: Parameters, mean: Tensor, scale: Tensor, codes: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rate of each state and the distortion of its code, (G, n) each in nats.

    The rate is the analytic divergence from a Gaussian prior, ln q(z|x) - ln r(z) at the code for a mixture.
    """
    prior_mean, prior_scale = parameters["prior.mean"], parameters["prior.log_scale"].exp()
    if "prior.logits" in parameters:
        # every component at every code: (G, n, components)
        log_prior = log_density(codes.unsqueeze(2), prior_mean.unsqueeze(1), prior_scale.unsqueeze(1))
        log_prior = log_prior + parameters["prior.logits"].log_softmax(-1).unsqueeze(1)
        rates = log_density(codes, mean, scale) - log_prior.logsumexp(-1)
    else:
        rates = gaussian_kl(mean, scale, prior_mean, prior_scale)
    logits = linear(codes, parameters["decoder.weight"], parameters["decoder.bias"])
    return rates, cross_entropies(logits, classes)


def gaussian_kl(mean: Tensor, scale: Tensor, prior_mean: Tensor, prior_scale: Tensor) -> Tensor:
    """Return KL(N(mean, scale^2) || N(prior_mean, prior_scale^2)) in nats, summed over the last dimension."""
    ratio = scale / prior_scale
    return (ratio.square() / 2 + ((mean - prior_mean) / prior_scale).square() / 2 - ratio.log() - 0.5).sum(-1)


def log_density(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the log density of a diagonal Gaussian, summed over the last dimension."""
    return -(((values - mean) / scale).square() / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)
