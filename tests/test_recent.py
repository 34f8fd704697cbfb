"""What was used last stays, as much of it as fits."""

from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.recent import RecentlyUsed


@given(
    st.integers(0, 12),
    st.integers(0, 2),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 8))),
)
def test_it_holds_what_a_list_in_order_of_use_would(budget, at_least, uses):
    memory, order = RecentlyUsed(budget, len, at_least=at_least), []  # (key, value), the last used last
    for puts, key, weight in uses:
        held = dict(order)
        if puts:
            memory.put(key, "x" * weight)
            if weight <= budget or at_least:
                order = [(k, v) for k, v in order if k != key] + [(key, "x" * weight)]
            while sum(len(v) for _, v in order) > budget and len(order) > at_least:
                order.pop(0)
        else:
            assert memory.get(key) == held.get(key)
            order.sort(key=lambda item: item[0] == key)
        assert len(memory) == len(order) and memory.held == sum(len(v) for _, v in order)
        assert all(k in memory for k, _ in order)
    memory.clear()
    assert (len(memory), memory.held) == (0, 0)


def test_values_without_a_weight_are_counted():
    memory = RecentlyUsed(2)
    for key in "abc":
        memory.put(key, key)
    assert [memory.get(key) for key in "abc"] == [None, "b", "c"]
