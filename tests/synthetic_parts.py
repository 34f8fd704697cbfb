"""Generated worlds, and things that live in them."""

from hypothesis import strategies as st

from rlaif_fast.data.synthetic.worlds import LEVELS, Thing, sample_world

worlds = st.builds(
    lambda seed, difficulty: sample_world(f"h/{seed}", difficulty),
    st.integers(0, 10**9),
    st.sampled_from(sorted(LEVELS)),
)


def thing(shape="circle", color="red", quadrant="top left"):
    return Thing(shape, color, quadrant, 0.18, (0.0, 0.0))
