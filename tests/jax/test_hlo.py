"""What is read off a compiled step, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from mmcl_jax.tools import hlo, traffic
from mmcl_jax.training import flops

HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0:T(8,128)})->f32[4,8]{1,0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %scattered = f32[2,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%p, %x)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%inner (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %moved = f32[4,8]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[4,8]) -> f32[2,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[4,8]{1,0:T(8,128)} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %slice = f32[2,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.9)
}

%async_collective_fusion.1 (p: f32[4,8]) -> f32[32,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %piece = f32[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (p: f32[4,8]) -> f32[32,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %piece.1 = f32[32,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%never (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %lost = f32[4,8]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = (f32[4,8]{1,0:T(8,128)S(1)}, /*index=1*/bf16[3]{0}) all-reduce(%x, %x), replica_groups={}, to_apply=%add
  %all-gather-start = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %first = f32[32,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %second = f32[32,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %shifted = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %all-gather-done = f32[16,8]{1,0} all-gather-done(%all-gather-start)
  %async = ((f32[4,8]), f32[4,8], u32[]) async-start(%x), calls=%inner
  %async-done = f32[4,8]{1,0} async-done(%async), calls=%inner
  %loop = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %fusion = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="all-reduce(x)"}
}
"""


def test_collectives_of_a_known_text():
  found, loops = hlo.read(HLO)
  assert {(one.kind, one.count, one.bytes, one.group) for one in found} == {
    ("all-reduce", 1, 4 * 8 * 4 + 3 * 2, 8),  # no groups given: all 8
    ("all-gather", 1, 32 * 8 * 4, 8),  # once, though both fusions of its chain name it
    ("all-gather", 1, 16 * 8 * 4, 4),  # the result, not the operand in the tuple
    ("collective-permute", 1, 4 * 8 * 4, 8),
    ("all-to-all", 1, 4 * 8 * 4, 4),  # once, though start and done both name it
    ("reduce-scatter", 6, 2 * 8 * 4 * 2, 2),  # 5 turns and 1; of the operand
    ("reduce-scatter", 1, 4 * 8 * 4, 4),
  }  # the fusion, which sums all and keeps a slice
  assert sorted(loop.trips for loop in loops) == [0, 5]


def test_bytes_sent_by_a_device():
  def sent(kind, group):
    return hlo.Collective(kind, 3, 800, group).sent

  assert sent("all-reduce", 4) == 3 * 2 * 600
  assert sent("all-gather", 4) == sent("reduce-scatter", 4) == sent("all-to-all", 4) == 3 * 600
  assert sent("collective-permute", 4) == 3 * 800
  assert sent("all-reduce", 1) == 0
  total = hlo.by_kind(
    [hlo.Collective("all-reduce", 3, 800, 4), hlo.Collective("all-reduce", 1, 8, 2)]
  )
  assert total == {"all-reduce": {"count": 4, "bytes": 2408, "sent": 3608}}


@pytest.mark.parametrize(
  "text, size",
  [
    ("f32[]", 4),
    ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
    ("pred[7]", 7),
    ("s4[3]", 2),
    ("token[]", 0),
    ("(f32[2]{0}, u8[3]{0:S(1)}, c64[2])", 27),
    ("f8e4m3fn[6]", 6),
    ("f32[<=4,2]", 32),
  ],
)
def test_bytes_of_a_type(text, size):
  assert hlo.shape_bytes(text) == size


@pytest.mark.parametrize(
  "text, size",
  [
    ("replica_groups={{0,1},{2,3}}", 2),
    ("replica_groups=[4,2]<=[8]", 2),
    ("replica_groups=[1,8]<=[2,4]T(1,0)", 8),
    ("", 16),
    ("replica_groups={}", 16),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}", 4),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x={7}", 4),
  ],
)
def test_devices_of_a_group(text, size):
  assert hlo.group_size(text, 16) == size


def test_products_are_counted_by_hand():
  def count(f, *shapes):
    return flops.matmul_flops(
      jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    )

  assert count(lambda x, w: x @ w, (6, 5), (5, 4)) == 2 * 6 * 5 * 4
  assert (
    count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (3, 6, 5), (3, 5, 4)) == 3 * 2 * 6 * 5 * 4
  )
  # forwards, and of w
  assert count(jax.grad(lambda w, x: jnp.square(x @ w).sum()), (5, 4), (6, 5)) == 2 * (
    2 * 6 * 5 * 4
  )

  def loop(w, x):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  assert count(loop, (4, 4), (3, 4)) == 7 * 2 * 3 * 4 * 4
  again = jax.value_and_grad(
    lambda w, x: jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w) @ w))(w).sum()
  )
  # both; both again; of w twice and of sin(x @ w)
  assert count(again, (4, 4), (3, 4)) == (2 + 2 + 3) * 2 * 3 * 4 * 4

  def conv(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert count(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)

  def branch(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert count(branch, (3, 4), (4, 4)) == 2 * 2 * 3 * 4 * 4
  idle = jax.jit(lambda x, w: (x @ w, x @ w @ w))
  # the compiler leaves the other out too
  assert count(lambda x, w: idle(x, w)[0], (3, 4), (4, 4)) == 2 * 3 * 4 * 4

  def kernel(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]

  def by_pallas(x, w):
    rows = pl.BlockSpec((8, 16), lambda i: (i, 0))
    whole = pl.BlockSpec((16, 32), lambda i: (0, 0))
    out = pl.BlockSpec((8, 32), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((24, 32), jnp.float32)
    return pl.pallas_call(kernel, shape, grid=(3,), in_specs=[rows, whole], out_specs=out)(x, w)

  assert count(by_pallas, (24, 16), (16, 32)) == 2 * 24 * 16 * 32
  mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
  )
  assert count(split, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


def test_memory_and_costs_of_a_product():
  shape = (
    jax.ShapeDtypeStruct((128, 256), jnp.float32),
    jax.ShapeDtypeStruct((256, 64), jnp.float32),
  )
  compiled = jax.jit(lambda x, w: x @ w).lower(*shape).compile()
  memory, costs = hlo.memory(compiled), hlo.costs(compiled)
  assert (memory["arguments"], memory["output"], memory["aliased"]) == (
    4 * (128 * 256 + 256 * 64),
    4 * 128 * 64,
    0,
  )
  assert (
    memory["total"]
    == memory["arguments"] + memory["output"] + memory["temporaries"] + memory["code"]
  )
  assert 1 <= costs["flops"] / (2 * 128 * 256 * 64) < 1.1
  assert 1 <= costs["bytes_accessed"] / (memory["arguments"] + memory["output"]) < 1.5
  given_up = jax.jit(lambda x: x + 1, donate_argnums=0).lower(shape[0]).compile()
  # once, not twice
  assert hlo.memory(given_up)["total"] - hlo.memory(given_up)["code"] == 4 * 128 * 256


# A loop of 5 turns over a stack of rows, between an input that is fetched to VMEM and exchanges.
TRAFFIC = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_row (p0: f32[4,16,128], p1: s32[]) -> f32[16,128] {
  %p0 = f32[4,16,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %row = f32[1,16,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,16,128}
  %flat = f32[16,128]{1,0:T(8,128)} bitcast(%row)
  ROOT %twice = f32[16,128]{1,0:T(8,128)} add(%flat, %flat)
}

%fused_update (p0: bf16[4,16,128], p1: f32[16,128], p2: s32[]) -> (bf16[4,16,128], f32[16,128]) {
  %p0.1 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1.1 = f32[16,128]{1,0:T(8,128)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %half = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} convert(%p1.1)
  %stack = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0.1, %half, %p2.1, %zero.1, %zero.1)
  ROOT %both = (bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, f32[16,128]{1,0:T(8,128)S(1)}) tuple(%stack, %p1.1)
}

%fused_whole (p0: f32[16,128]) -> f32[2048] {
  %p0.2 = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %flat.2 = f32[2048]{0:T(1024)} bitcast(%p0.2)
}

%fused_nested (p0: f32[16,128]) -> f32[2048] {
  %p0.3 = f32[16,128]{1,0:T(8,128)} parameter(0)
  %inner = f32[2048]{0:T(1024)} fusion(%p0.3), kind=kLoop, calls=%fused_whole
  ROOT %twice.3 = f32[2048]{0:T(1024)} add(%inner, %inner)
}

%body (p: (s32[], f32[4,16,128], bf16[4,16,128])) -> (s32[], f32[4,16,128], bf16[4,16,128]) {
  %p = (s32[]{:T(128)}, f32[4,16,128]{2,1,0:T(8,128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %rows = f32[4,16,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %made = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %one = f32[16,128]{1,0:T(8,128)} fusion(%rows, %i), kind=kLoop, calls=%fused_row
  %two = (bf16[4,16,128]{2,1,0:T(8,128)(2,1)}, f32[16,128]{1,0:T(8,128)S(1)}) fusion(%made, %one, %i), kind=kLoop, calls=%fused_update
  %made.1 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%two), index=0
  %three = f32[2048]{0:T(1024)S(1)} fusion(%one), kind=kLoop, calls=%fused_nested
  ROOT %t = (s32[]{:T(128)}, f32[4,16,128]{2,1,0:T(8,128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %rows, %made.1)
}

%condition (p: (s32[], f32[4,16,128], bf16[4,16,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4,16,128]{2,1,0:T(8,128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %five = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

ENTRY %main (x: f32[3,130], rows: f32[4,16,128], made: bf16[4,16,128]) -> f32[3,130] {
  %x = f32[3,130]{1,0:T(8,128)} parameter(0)
  %rows.2 = f32[4,16,128]{2,1,0:T(8,128)} parameter(1)
  %made.2 = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %first = s32[]{:T(128)} constant(0)
  %copy-start = (f32[3,130]{1,0:T(8,128)S(1)}, f32[3,130]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[3,130]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %room = f32[64,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %half.2 = bf16[3,130]{1,0:T(8,128)(2,1)} convert(%copy-done)
  %start = (s32[]{:T(128)}, f32[4,16,128]{2,1,0:T(8,128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) tuple(%first, %rows.2, %made.2)
  %loop = (s32[]{:T(128)}, f32[4,16,128]{2,1,0:T(8,128)}, bf16[4,16,128]{2,1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  %sum = bf16[3,130]{1,0:T(8,128)(2,1)} all-reduce(bf16[3,130]{1,0:T(8,128)(2,1)} %half.2), replica_groups={}, to_apply=%add
  %all-gather-start = (bf16[3,130]{1,0:T(8,128)(2,1)}, bf16[12,130]{1,0:T(8,128)(2,1)}) all-gather-start(%sum), replica_groups={}, dimensions={0}
  %all-gather-done = bf16[12,130]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start)
  ROOT %kernel = f32[3,130]{1,0:T(8,128)} custom-call(%all-gather-done, %copy-done), custom_call_target="tpu_custom_call"
}
"""


def test_bytes_of_the_memory_by_hand():
  row, index = 16 * 128, 4
  # of the stacks only the row that is read or written; the copy of it in VMEM counts for nothing
  turn = (4 * row + index + 4 * row) + (4 * row + index + 2 * row)
  turn += 4 * row  # to VMEM, by way of a fusion in a fusion
  turn += index + 4 + 1  # the condition
  x = 8 * 256 * 4  # [3, 130] in tiles of [8, 128]
  half, gathered = x // 2, 2 * x // 2
  fetched, converted = x, half
  exchanged = (half + half) + (half + gathered)
  kernel = gathered + x
  assert traffic.hbm_bytes(TRAFFIC) == 5 * turn + fetched + converted + exchanged + kernel


@pytest.mark.parametrize(
  "text, size",
  [
    ("f32[3,130]{1,0:T(8,128)}", 8 * 256 * 4),
    ("f32[3,130]{0,1:T(8,128)}", 136 * 128 * 4),  # the first dimension is the minor one
    ("bf16[3,130]{1,0:T(4,128)(2,1)}", 4 * 256 * 2),
    ("bf16[2,3,130]{2,1,0:T(8,128)(2,1)}", 2 * 8 * 256 * 2),
    ("f32[130]{0:T(1024)}", 4096),
    ("s32[]{:T(128)}", 4),
    ("f32[3,130]{1,0}", 3 * 130 * 4),
    ("pred[5]{0}", 5),
  ],
)
def test_bytes_of_a_padded_array(text, size):
  (array,) = hlo.arrays_of(text)
  assert array.padded_bytes == size


def test_products_of_a_compiled_step_are_counted_by_hand():
  def count(f, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.product_flops(jax.jit(f).lower(*arrays).as_text("hlo"))

  def conv(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def loop(w, x):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  assert count(lambda x, w: x @ w, (6, 5), (5, 4)) == 2 * 6 * 5 * 4
  assert count(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (3, 6, 5), (3, 4, 5)) == 3 * 2 * 120
  # 8 pixels, of which every second is the middle of 3: the last window hangs over by one
  assert count(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * (3 * 4 - 1) ** 2 * 3 * 5


BUFFERS = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add.20 @0> (size=512,offset=0): bf16[]{:T(256)}
allocation 1: size 4096, parameter 0, shape |f32[8,128]| at ShapeIndex {}, output shape is |f32[8,128]|, maybe-live-out:
 value: <152 param.4 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 2048, parameter 1, shape |bf16[8,128]| at ShapeIndex {}:
 value: <147 param.5 @0> (size=2048,offset=0): bf16[8,128]{1,0:T(8,128)(2,1)}
allocation 3: size 1024, output shape is |(f32[8,128], s32[])|, maybe-live-out:
allocation 4: size 512, constant:
allocation 5: size 98816, preallocated-temp:
allocation 6: size 16777216, color 1, preallocated-temp:
"""


def test_memory_of_a_buffer_assignment():
  assert hlo.memory_of_buffers(BUFFERS) == {
    "arguments": 4096 + 2048,
    "output": 4096 + 1024,
    "aliased": 4096,
    "temporaries": 512 + 512 + 98816,
    "total": 4096 + 2048 + 1024 + 512 + 512 + 98816,  # not what lies in VMEM
  }


# A product in each of 3 batches, as a TPU has it: batches are a dimension of the window, 3 wide, of
# which all but one place lie between or beyond the input.
BATCHED = """\
HloModule jit_product

ENTRY %main (x: bf16[3,6,5], y: bf16[3,5,4]) -> bf16[3,6,4] {
  %x = bf16[3,6,5]{2,1,0} parameter(0)
  %y = bf16[3,5,4]{2,1,0} parameter(1)
  ROOT %c = bf16[3,6,4]{2,1,0} convolution(%x, %y), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""


def test_a_batched_product_as_a_convolution():
  assert hlo.product_flops(BATCHED) == 2 * 3 * 6 * 5 * 4
