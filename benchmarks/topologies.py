"""What the joint recipe asks of TPU slices and nodes of GPUs: `mmcl compile` of its sizes on 8 to
512 chips, as one table.

    python benchmarks/topologies.py --out=topologies.jsonl    # minutes a case; run again, it goes on
    python benchmarks/topologies.py --sizes demo tiny --topologies v5e:4x4 --config.sharding="(('.*', 'fsdp'),)"

No TPU and no GPU is needed, but their compilers are (pip install 'mmcl-jax[tpu]', 'mmcl-jax[cuda]').
Every case is a process of its own and a line of --out, with what `mmcl compile` found or, where it
refused (a step that does not fit the memory), its one line; a case that died, or whose compiler is
not here, leaves none and is tried again. Further words go to `mmcl compile`: --batch, --config.x.y.
Products are bfloat16 unless they say otherwise. Ends with the table in Markdown of the cases asked
for: bounds from published peaks, not times.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = ("demo", "tiny", "medium", "base", "large")
TOPOLOGIES = (
  "v5e:4x4",
  "v5e:16x16",
  "v6e:16x16",
  "v5p:8x8x8",
  "2xv5e:16x16",
  "h100:8",
  "h100:4x8",
)
HEADER = (
  "size",
  "on",
  "batch",
  "parameters, M",
  "buffers, GiB",
  "of",
  "HBM traffic, GB",
  "TFLOP a chip",
  "sent, MB",
  "compute, ms",
  "memory, ms",
  "network, ms",
  "latency, ms",
  "limited by",
  "MFU at most",
)
TIMES = ("compute", "memory", "network", "latency")


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default="topologies.jsonl")
  parser.add_argument("--sizes", nargs="+", default=SIZES[1:], choices=SIZES)
  parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
  args, more = parser.parse_known_args()
  out, arguments = pathlib.Path(args.out), ["--config.model.dtype=bfloat16", *more]
  cases = [(size, topology) for size in args.sizes for topology in args.topologies]
  # another level, another answer
  asked = [f"JAX_OPTIMIZATION_LEVEL={os.environ.get('JAX_OPTIMIZATION_LEVEL', '')}", *arguments]
  done, failed = read(out, asked), []
  for i, case in enumerate(cases):
    if case in done:
      continue
    print(f"{i + 1} of {len(cases)}: {' on '.join(case)}", flush=True)
    found = compile_case(*case, arguments)
    if found is None:
      failed.append(case)
      continue
    done[case] = found
    with open(out, "a") as file:
      file.write(
        json.dumps({"size": case[0], "topology": case[1], "arguments": asked, "found": found})
        + "\n"
      )
  print(table([(case, done[case]) for case in cases if case in done]))
  if failed:
    raise SystemExit(
      f"{len(failed)} cases died: {', '.join(' on '.join(case) for case in failed)}; run the "
      "command again"
    )


def read(out: pathlib.Path, arguments: list[str]) -> dict[tuple[str, str], dict]:
  """Cases that --out holds, of the same arguments. A torn last line, of a run that was stopped
  while it wrote, is cut off."""
  done = {}
  text = out.read_text() if out.is_file() else ""
  if text and not text.endswith("\n"):
    text = text[: text.rfind("\n") + 1]
    out.write_text(text)
  for line in text.splitlines():
    one = json.loads(line)
    if one["arguments"] == arguments:
      done[one["size"], one["topology"]] = one["found"]
  return done


def compile_case(size: str, topology: str, arguments: list[str]) -> dict | None:
  """What `mmcl compile` says, {"error": its line} where it refused the step, None where it died or
  has no compiler."""
  command = [
    sys.executable,
    "-m",
    "mmcl_jax.tools.compile_step",
    f"--config={ROOT}/configs/joint.py:{size}",
    f"--topology={topology}",
    *arguments,
  ]
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  done = subprocess.run(
    command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
  )
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  print(done.stderr[-2000:], flush=True)
  if done.returncode != 2 or "pip install" in done.stderr:
    return None
  return {"error": done.stderr.strip().splitlines()[-1]}


def table(cases) -> str:
  lines = [HEADER, ["---"] * len(HEADER)]
  for (size, topology), found in cases:
    if "error" in found:
      lines.append(
        [size, topology, found["error"].removeprefix("mmcl: error: "), *[""] * (len(HEADER) - 3)]
      )
      continue
    bound = found["estimate"]
    times = [f"{1e3 * bound[f'{name}_s']:.2f}" for name in TIMES]
    lines.append(
      [
        size,
        topology,
        f"{found['batch']:,}",
        f"{found['params'] / 1e6:.1f}",
        f"{found['memory']['total'] / 2**30:.2f}",
        f"{found['memory']['capacity'] / 2**30:.0f}",
        f"{found['hbm_bytes'] / 1e9:.1f}",
        f"{found['matmul_flops'] / 1e12:.3f}",
        f"{sum(kind['sent'] for kind in found['collectives'].values()) / 1e6:.1f}",
        *times,
        bound["limited_by"],
        f"{bound['mfu_bound']:.0%}",
      ]
    )
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
  main()
