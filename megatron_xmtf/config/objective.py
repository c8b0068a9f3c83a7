"""Keys of an objective: what a model is asked to do with plain documents.

    objective: alexatm_denoising                         by name, with its own settings
    objective: {name: span_corruption, noise_density: 0.5, mean_span_length: 3, prefix_text: "[NLU] "}

    key               alexatm_denoising   span_corruption   causal      prefix_lm
    noise_density     0.15                0.15              -           -
    mean_span_length  3                   3                 -           -
    minimum_inputs    -                   -                 0.2         0
    maximum_inputs    -                   -                 0.8         1
    prefix_token      none                none              [CLM]       none
    sentinel          -                   <extra_id_{}>     -           -

A key marked - is none of the objective's, and giving it is an error.
Source:  alexatm_denoising and causal: Soltan et al. 2022 (arXiv 2208.01448). The others: Raffel et al. 2020 (arXiv
         1910.10683) and t5.data.preprocessors, `random_spans_noise_mask` and `random_prefix_noise_mask`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_xmtf.config.section import Fraction, Section

__all__ = ["Objective", "ObjectiveConfig", "ObjectiveName"]

ObjectiveName = Literal["alexatm_denoising", "span_corruption", "causal", "prefix_lm"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "alexatm_denoising": {"noise_density": 0.15, "mean_span_length": 3.0},
    "span_corruption": {"noise_density": 0.15, "mean_span_length": 3.0, "sentinel": "<extra_id_{}>"},
    "causal": {"minimum_inputs": 0.2, "maximum_inputs": 0.8, "prefix_token": "[CLM]"},
    "prefix_lm": {"minimum_inputs": 0.0, "maximum_inputs": 1.0},
}
"""The settings that an objective has, and what they are where the configuration does not say."""
SPECIFIC = ("noise_density", "mean_span_length", "minimum_inputs", "maximum_inputs", "sentinel")
"""Settings that some objectives do not have; the others are everybody's."""


class ObjectiveConfig(Section):
    """An objective and its settings; what is left out is filled in from `DEFAULTS`."""

    name: ObjectiveName
    """alexatm_denoising: spans are dropped without a trace, the targets are the whole document. span_corruption: spans
    are dropped for sentinels, the targets are the spans. causal: the inputs are the first part of a document, marked
    with a token, the targets the rest. prefix_lm: the same without a mark, cut anywhere."""
    noise_density: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Part of the tokens that is dropped. 0.15: T5, AlexaTM."""
    mean_span_length: Annotated[float, Field(ge=1)] | None = None
    """Tokens of a dropped span on average (span_corruption), or the rate of the Poisson distribution that lengths are
    drawn from (alexatm_denoising; lengths of 0 drop nothing and are drawn again). 3: T5, BART, AlexaTM."""
    minimum_inputs: Fraction | None = None
    """Smallest part of the document that goes to the inputs; at least one token does."""
    maximum_inputs: Fraction | None = None
    """Largest part; at least one token is left for the targets. 0.2 to 0.8: AlexaTM."""
    prefix_token: str | None = None
    """Word of the vocabulary put before the inputs, such as [CLM]; "" for none. This or `prefix_text`."""
    prefix_text: Annotated[str, Field(min_length=1)] | None = None
    """Text put before the inputs, tokenised by itself, such as UL2's "[NLU] ". This or `prefix_token`."""
    sentinel: str | None = None
    """How the vocabulary spells its sentinels, {} being 0, 1, 2 ...: "<extra_id_{}>" in T5, mT5 and Flan-T5."""
    chunk_length: Annotated[int, Field(ge=3, strict=True)] | None = None
    """Tokens of a document that an example is made of at most; a longer one is cut into parts of so many and the rest.
    None: as many as always fit the rows of the run."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Decides where documents are cut in two. Apart from the run's `seed`: lengths follow from it, and so the rows."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Put the objective's own settings in, so that a resolved configuration shows all of them."""
        if not isinstance(values, dict) or values.get("name") not in DEFAULTS:
            return values
        own = DEFAULTS[values["name"]]
        for key in SPECIFIC:
            if values.get(key) is not None and key not in own:
                having = ", ".join(name for name, settings in DEFAULTS.items() if key in settings)
                raise ValueError(f"objective {values['name']} has no {key}; that is a setting of {having}")
        given = {key: value for key, value in values.items() if value is not None}
        # A text of one's own takes the place of the objective's token.
        defaults = {key: value for key, value in own.items() if key != "prefix_token" or "prefix_text" not in given}
        return {**defaults, **given}

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        if self.prefix_token and self.prefix_text:
            raise ValueError(f"objective {self.name}: give one of prefix_token and prefix_text")
        low, high = self.minimum_inputs, self.maximum_inputs
        if low is not None and high is not None and low > high:
            raise ValueError(f"objective {self.name}: minimum_inputs={low:g} is more than maximum_inputs={high:g}")
        if self.sentinel is not None and self.sentinel.count("{}") != 1:
            raise ValueError(
                f"objective {self.name}: sentinel={self.sentinel!r} must have one {{}}, the place of the number"
            )
        return self


def _as_mapping(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Objective = Annotated[ObjectiveConfig, BeforeValidator(_as_mapping)]
"""An objective in a configuration: its keys, or its name alone."""
