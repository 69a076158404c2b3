"""Products of compiled programs: as XLA counts them where nothing loops, else as counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.hosts.compiled import Product, matrix_products, total_flop


def compiled(function, *shapes):
    arguments = [jnp.zeros(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def flop_of(function, *shapes, trip_counts=()):
    return total_flop(matrix_products(compiled(function, *shapes).as_text(), trip_counts))


CONVOLUTION = dict(window_strides=(2, 1), padding=((1, 2), (0, 3)), lhs_dilation=(1, 2), rhs_dilation=(2, 1))


@pytest.mark.parametrize(
    "function, shapes",
    [
        (jnp.dot, [(5, 7), (7, 11)]),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), [(3, 5, 7), (3, 11, 7)]),
        (lambda a, b: jnp.einsum("ijk,kjl->il", a, b), [(5, 7, 3), (3, 7, 11)]),
        (lambda a, b, c: a @ b @ c, [(5, 7), (7, 11), (11, 2)]),
        (lambda a, b: jax.lax.conv_general_dilated(a, b, **CONVOLUTION), [(2, 3, 8, 9), (4, 3, 3, 2)]),
        (
            lambda a, b: jax.lax.conv_general_dilated(a, b, (1, 1), "SAME", feature_group_count=2),
            [(2, 4, 8, 9), (6, 2, 3, 2)],
        ),
    ],
)
def test_without_loops_it_is_what_xla_counts(function, shapes):
    program = compiled(function, *shapes)
    assert total_flop(matrix_products(program.as_text())) == program.cost_analysis()["flops"]


def test_what_is_no_product_does_not_count():
    assert flop_of(lambda a: jnp.sum(jnp.tanh(a) * a, axis=0), (5, 7)) == 0


def test_a_scan_counts_its_length_and_scans_in_scans_multiply():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, _):
        return jax.lax.scan(inner, x, jnp.ones((4, 7, 7)))[0], None

    def run(x):
        return jax.lax.scan(outer, x, None, length=3)[0]

    assert flop_of(run, (5, 7)) == 3 * 4 * 2 * 5 * 7 * 7


def rising(x, count):
    """A loop of `count` iterations of one product, each with a loop of as many more and a second one."""

    def turn(_, x):
        x = jnp.tanh(x @ jnp.ones((7, 7)))
        return jax.lax.fori_loop(0, jnp.int32(jnp.sum(x > 0)), lambda _, y: jnp.sin(y @ jnp.ones((7, 7))), x)

    return jax.lax.fori_loop(0, count, turn, x)


def test_loops_that_the_data_end_turn_as_often_as_told():
    one = 2 * 5 * 7 * 7
    assert flop_of(rising, (5, 7), 3, trip_counts=(10, 2.5)) == 10 * one + 10 * 2.5 * one


@pytest.mark.parametrize("trip_counts", [(), (10,)])
def test_a_loop_of_unknown_trip_count_is_refused(trip_counts):
    with pytest.raises(ValueError, match="is not in `trip_counts`"):
        flop_of(rising, (5, 7), 3, trip_counts=trip_counts)


def test_a_loop_without_products_needs_no_turns():
    def run(x, count):
        return jax.lax.fori_loop(0, count, lambda _, y: jnp.sin(y), x) @ jnp.ones((7, 2))

    assert flop_of(run, (5, 7), 3) == 2 * 5 * 7 * 2


def test_a_conditional_counts_as_its_most_expensive_branch():
    def run(x, which):
        branches = [
            lambda x: x,
            lambda x: x @ jnp.ones((7, 7)),
            lambda x: x @ jnp.ones((7, 9)) @ jnp.ones((9, 7)),
        ]
        return jax.lax.switch(which, branches, x)

    assert flop_of(run, (5, 7), 1) == 2 * (2 * 5 * 7 * 9)


def test_products_are_told_apart_by_their_axes():
    found = matrix_products(compiled(lambda a, b, c: (a @ b) @ c, (5, 7), (7, 11), (11, 13)).as_text())
    assert total_flop(found, (5, 7, 11)) == 2 * 5 * 7 * 11
    assert total_flop(found, (11, 13)) == 2 * 5 * 11 * 13
    assert total_flop(found, (7, 13)) == 0


# Programs of a GPU, whose products are calls of a library; written by hand after XLA's documentation.
CALL = """HloModule m

ENTRY %main (a: f32[3,5,7], b: f32[3,7,11]) -> f32[3,5,11] {
  %a = f32[3,5,7]{2,1,0} parameter(0)
  %b = f32[3,7,11]{2,1,0} parameter(1)
  %call = (f32[3,5,11]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="TARGET", """ + (
    'backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
    '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}\n'
    "  ROOT %out = f32[3,5,11]{2,1,0} get-tuple-element(%call), index=0\n}\n"
)


def test_products_that_a_library_computes_count():
    for target in ("__cublas$gemm", "__cublas$lt$matmul"):
        assert total_flop(matrix_products(CALL.replace("TARGET", target))) == 2 * 3 * 5 * 7 * 11


def test_a_library_that_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"__onednn\$matmul"):
        matrix_products(CALL.replace("TARGET", "__onednn$matmul"))


def test_operands_may_have_their_types_beside_them():
    text = CALL.replace("(%a, %b)", "(f32[3,5,7]{2,1,0} %a, f32[3,7,11]{2,1,0} %b)")
    (found,) = matrix_products(text.replace("TARGET", "__cublas$gemm"))
    assert found == Product(frozenset({3, 5, 7, 11}), 2 * 3 * 5 * 7 * 11, 1.0)
    np.testing.assert_equal(found.times, 1.0)
