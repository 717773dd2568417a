"""L4's kit for drafters, told what to look at."""

from l4core.testing.conformance import DrafterConformance


class TestBigram(DrafterConformance):
    plugin, drafter = "l4_bigram_drafter", "bigram"
    good_options = ({}, {"entries": "3"})
    bad_options = ({"entries": "0"}, {"entries": "many"})
