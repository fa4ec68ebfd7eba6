"""SGLang's prefix cache over the tiers: how it is put together, named, measured and reported."""
