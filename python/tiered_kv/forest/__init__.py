"""The radix forest: which prefixes are known, in which tiers they live, and who pins them."""
