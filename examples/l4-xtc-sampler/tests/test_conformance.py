"""L4's kit for samplers, told what to look at."""

from dataclasses import replace

from l4core.plugin_api import SamplingParams
from l4core.testing.conformance import SamplerConformance


class TestXtc(SamplerConformance):
    plugin, sampler = "l4_xtc_sampler", "xtc"
    good_args = ({"threshold": 0.02, "probability": 1.0}, {"threshold": 0.02, "probability": 0.5}, {})
    bad_args = ({"treshold": 0.1}, {"threshold": 0.6}, {"threshold": "0.1"}, {"probability": -1}, {"probability": True})

    def params(self) -> list[SamplingParams]:
        return [replace(params, seed=i) for i, params in enumerate(super().params())]
