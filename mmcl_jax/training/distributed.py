"""Several hosts as one run: how they find each other, agree before anything is compiled, and end
together.

A host is a process of the run; they are numbered from 0, and host 0 coordinates. They are started
from, in this order,

    --coordinator=HOST:PORT --processes=N --process=I    on every host, I from 0 to N - 1
    SLURM                                                a step of srun with more than one task
    a TPU slice                                          GKE's variables or the metadata of a TPU
      VM, more than one worker

and else there is one process, nothing is started and nothing waited for (a shell of salloc, a
single TPU VM).

JAX's distributed runtime does the work: its heartbeats, key-value store and barriers. JAX is
imported where it is used: `mmcl embed` checks its flags before.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import uuid
from typing import Any, NamedTuple

import numpy as np

import mmcl_jax
from mmcl_jax.errors import UserError, one_line
from mmcl_jax.support import processes

JOIN_S = 300  # the hosts must all have come by then
HEARTBEAT_S = 30  # a host that is silent for so long is lost, and ends all others
WAIT_S = 900  # for the slowest host to be as far as the others, e.g. to open a cohort
MEET_S = 30 * 24 * 3600  # `meet`: a month, for ever to all intents
LEAVE_S = 5  # a host that fails waits so long for the others to have heard it

HELP = """
on several hosts, the same command on each (not with SLURM's srun nor on a TPU slice, which are recognised):
  --coordinator=HOST:PORT  address of process 0, a free port
  --processes=N            how many there are
  --process=I              which one this is, 0 to N - 1"""

# sh: says $0 when the pipe breaks
LAST_WORDS = 'trap "" HUP INT TERM USR1 USR2; read -r orderly || echo "$0" >&2'


class Host(NamedTuple):
  """This process among the run's, the client of JAX's distributed runtime, and a process that
  speaks if this one cannot."""

  index: int = 0
  count: int = 1
  client: Any = None
  last_words: subprocess.Popen | None = None


here = Host()
rounds = itertools.count()  # a key of the store and a barrier are for once; every host counts alike
ending = threading.Lock()  # held from the moment that this process ends early


@contextlib.contextmanager
def joined(argv: list[str]):
  """Makes this process one of the run's hosts and yields `argv` without the flags for that.

  With several hosts, whatever ends one early ends all: each prints one line that names that host
  and the reason, and exits with its status (2 for a UserError). A host that ends without a word is
  missed after HEARTBEAT_S.
  """
  given, rest = flags(argv)
  if {"-h", "--help"} & set(argv):
    try:
      yield rest
    finally:
      print(HELP)
    return
  start = how_to_start(given, os.environ)
  if start is None:
    yield rest
    return
  listener = connect(start)
  try:
    yield rest
  except UserError as error:
    leave(2, one_line(error))
  except KeyboardInterrupt as signalled:
    leave(status_of(signalled), "interrupted; the same command goes on from what is saved")
  except SystemExit as error:
    if error.code not in (None, 0, os.EX_TEMPFAIL):
      leave(error.code if isinstance(error.code, int) else 1, f"ended with status {error.code}")
    part(listener)  # all hosts come to these together
    raise
  except BaseException as error:
    traceback.print_exc()
    leave(1, f"{type(error).__name__}: {one_line(error)[:300]}")
  part(listener)


def status_of(signalled: KeyboardInterrupt) -> int:
  """The status to end with: 75 (run the command again) after SIGTERM and its like, 130 after
  Ctrl-C."""
  return os.EX_TEMPFAIL if signalled.args and signalled.args[0] in processes.ENDS else 130


def flags(argv: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
  """The host flags of `argv`, None where there are none, and the rest of it."""
  found = [re.fullmatch("--(coordinator|processes|process)=(.*)", arg) for arg in argv]
  rest = [arg for arg, match in zip(argv, found) if not match]
  given = {match[1]: match[2] for match in found if match}
  if not given:
    return None, rest
  usage = "expected --coordinator=HOST:PORT --processes=N --process=I, with I from 0 to N - 1"
  if (
    len(given) < 3
    or not given["processes"].isdecimal()
    or not given["process"].isdecimal()
    or not re.fullmatch(r"\S+:\d{1,5}", given["coordinator"])
  ):
    shown = " ".join(f"--{name}={value}" for name, value in given.items())
    raise UserError(f"{shown} does not tell where the other hosts are; {usage}")
  count, index = int(given["processes"]), int(given["process"])
  if not index < count:
    raise UserError(f"--process={index} is none of --processes={count}; {usage}")
  return dict(coordinator_address=given["coordinator"], num_processes=count, process_id=index), rest


def how_to_start(given: dict[str, Any] | None, environ) -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize; None: one process, nothing to start."""
  if given:
    return (
      given | {"cluster_detection_method": "deactivate"} if given["num_processes"] > 1 else None
    )
  # Not SLURM_NTASKS: that is the allocation's also in the one shell of salloc or sbatch, where the
  # others never come.
  if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
    return dict(
      cluster_detection_method="slurm",
      num_processes=int(environ["SLURM_STEP_NUM_TASKS"]),
      process_id=int(environ["SLURM_PROCID"]),
      local_device_ids=gpus_of_task(environ),
    )
  return {} if tpu_workers(environ) > 1 else None  # JAX finds the rest where this was found


def gpus_of_task(environ) -> list[int] | None:
  """Which of the GPUs that it sees a SLURM task uses; None: as JAX would have it, the one of its
  SLURM_LOCALID.

  JAX knows only one task a GPU, all of which see all GPUs of the node. Here a task alone on its
  node has all of them, tasks that SLURM bound to their own GPUs have those, and tasks that see the
  same ones share them evenly.
  """
  visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
  seen = len(visible) or int(environ.get("SLURM_GPUS_ON_NODE", 0))
  if not seen or environ.get("JAX_LOCAL_DEVICE_IDS"):
    return None
  tasks, local = tasks_of_node(environ), int(environ["SLURM_LOCALID"])
  if tasks == 1 or seen < tasks or "SLURM_GPUS_PER_TASK" in environ:
    return list(range(seen))
  if seen % tasks:
    raise UserError(
      f"SLURM started {tasks} tasks on a node with {seen} GPUs; expected as many tasks as GPUs, "
      "one, or a number "
      "that divides them (--ntasks-per-node)"
    )
  return list(range(local * seen // tasks, (local + 1) * seen // tasks))


def tasks_of_node(environ) -> int:
  """Of this node; SLURM lists them as 4(x2),3."""
  counts = [
    int(count)
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(",")
    for count, times in [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()]
    for _ in range(int(times or 1))
  ]
  return counts[int(environ["SLURM_NODEID"])]


def tpu_workers(environ) -> int:
  """Hosts of the TPU slices that this one belongs to; 1 where there is no TPU, or it is not to be
  used (JAX_PLATFORMS)."""
  platforms = environ.get("JAX_PLATFORMS", "")
  if (platforms and "tpu" not in platforms) or not (
    importlib.util.find_spec("libtpu") or environ.get("TPU_LIBRARY_PATH")
  ):
    return 1
  slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  if names := environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES"):  # GKE
    return len(names.split(",")) * slices
  import jax  # noqa: F401  (sets TPU_SKIP_MDS_QUERY where there is no TPU chip)

  if environ.get("TPU_SKIP_MDS_QUERY"):
    return 1
  found = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", metadata("tpu-env"))
  return len(metadata("worker-network-endpoints").split(",")) * (int(found[1]) if found else slices)


def metadata(name: str) -> str:
  """An attribute of this Google Cloud machine; "" where it has none."""
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    # a proxy would not find this server
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:
    return ""


def connect(start: dict[str, Any]) -> threading.Thread:
  """Joins the other hosts; the thread that listens for their ends."""
  global here
  import jax
  from jax._src import distributed as runtime

  # SIGTERM stays ours (training.signals): JAX's service would keep it from ending a program that
  # never asks for it.
  jax.config.update("jax_enable_preemption_service", False)
  address = start.get("coordinator_address", "")
  # else JAX listens on every interface of the machine
  if re.match(r"(127\.|localhost:|\[::1\]:)", address):
    start = start | {"coordinator_bind_address": address}
  meeting = speaker(
    f"the hosts did not all come together{f' at {address}' if address else ''} within {JOIN_S} s; "
    "JAX's message "
    "above names those that did not (timed out task names; none: host 0, or its address); start "
    "the same command "
    "on every host, with a port that is free on the first"
  )
  # With a time of its own, shorter than the hosts', JAX's service tells all of them who did not
  # come.
  service, client = (
    runtime._jax.get_distributed_runtime_service,
    runtime._jax.get_distributed_runtime_client,
  )
  runtime._jax.get_distributed_runtime_service = functools.partial(
    service, cluster_register_timeout=JOIN_S
  )

  # given or found by JAX, the address is known here
  def client_past_proxies(address, *args, **kwargs):
    os.environ.update(around_proxies(address, os.environ))
    return client(address, *args, **kwargs)

  runtime._jax.get_distributed_runtime_client = client_past_proxies
  jax.config.update("jax_check_proxy_envs", False)  # a warning of the proxies that are passed by
  try:
    jax.distributed.initialize(
      **start, initialization_timeout=JOIN_S + 15, heartbeat_timeout_seconds=HEARTBEAT_S
    )
  except Exception as error:
    print(one_line(error)[:300], file=sys.stderr, flush=True)
    os._exit(2)  # an ordinary exit would wait for the hosts once more; `meeting` speaks
  except BaseException:
    hush(meeting)
    raise
  finally:
    runtime._jax.get_distributed_runtime_service, runtime._jax.get_distributed_runtime_client = (
      service,
      client,
    )
  hush(meeting)
  state = runtime.global_state
  who = f"host {state.process_id} of {state.num_processes}"
  # Nothing in this process can speak when the runtime aborts it, which is how it ends where another
  # host was lost.
  last_words = speaker(
    f"{who}: ended without a word: killed, out of memory, or aborted because another host was lost "
    f"({HEARTBEAT_S} s "
    "without a sign of it); its log and the other hosts' tell which; the same command goes on from "
    "the last "
    "checkpoint"
  )
  here = Host(state.process_id, state.num_processes, state.client, last_words)
  print(
    f"{who} has joined at {state.coordinator_address}; a host that is lost ends all others after "
    f"{HEARTBEAT_S} s",
    flush=True,
  )
  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  return listener


def around_proxies(address: str, environ) -> dict[str, str]:
  """What to add to the environment so that gRPC reaches HOST:PORT itself, not through the proxy of
  a login profile.

  gRPC takes grpc_proxy, https_proxy or http_proxy, but not for the hosts of no_grpc_proxy, or where
  that is not set, of no_proxy (grpc/doc/environment_variables.md). What is there stays.
  """
  if not any(name.lower() in ("grpc_proxy", "https_proxy", "http_proxy") for name in environ):
    return {}
  before = environ.get("no_grpc_proxy", environ.get("no_proxy", ""))
  return {"no_grpc_proxy": ",".join(filter(None, (before, address.rpartition(":")[0].strip("[]"))))}


def speaker(text: str) -> subprocess.Popen:
  """A process that says `text` as an error when this one ends without `hush`."""
  return subprocess.Popen(
    ["sh", "-c", LAST_WORDS, f"mmcl: error: {text}"],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
  )


def listen() -> None:
  """Ends this process when another host says that it ends early; an empty message is this one's
  own, orderly end."""
  message = None
  while message is None:
    try:
      message = here.client.blocking_key_value_get(f"mmcl/end/{here.index}", 3600_000)
    except Exception as error:
      if "DEADLINE_EXCEEDED" not in str(error):  # host 0 is lost: JAX ends this process
        return
  if message:
    end(*json.loads(message))


def leave(status: int, reason: str) -> None:
  """Ends all hosts: each prints `reason` under this one's number and exits with `status`."""
  line = f"mmcl: error: host {here.index} of {here.count}: {reason}"
  for other in range(here.count):
    with contextlib.suppress(Exception):  # host 0 is lost: JAX ends the others
      here.client.key_value_set(
        f"mmcl/end/{other}", json.dumps([status, line]), allow_overwrite=True
      )
  end(status, line)


def end(status: int, line: str) -> None:
  """Prints the line and ends this process; of two callers in it the first decides. Host 0 lets the
  others hear first."""
  ending.acquire()
  for call in (
    lambda: print(line, file=sys.stderr, flush=True),
    sys.stdout.flush,
    hush,
    lambda: here.client.wait_at_barrier("mmcl/end", LEAVE_S * 1000),
  ):
    with contextlib.suppress(Exception):  # nobody reads, or a host is lost
      call()
  if here.index == 0:
    time.sleep(1)
  os._exit(status)  # an ordinary exit would wait for hosts that may be stuck in a collective


def part(listener: threading.Thread) -> None:
  """The orderly end: waits for the other hosts."""
  global here
  import jax

  here.client.key_value_set(f"mmcl/end/{here.index}", "", allow_overwrite=True)
  listener.join()
  jax.distributed.shutdown()
  hush()
  here = Host()


def hush(words: subprocess.Popen | None = None) -> None:
  """There will be no last words, or none of that speaker."""
  (words or here.last_words).communicate(b"orderly\n")


def agree(facts: dict[str, Any]) -> None:
  """Raises a UserError where a fact (JSON) is not the same on every host; called by all of them,
  nothing is compiled."""
  if here.count == 1:
    return
  import jax

  name = f"mmcl/facts/{next(rounds)}"
  facts = {
    "jax": jax.__version__,
    "mmcl_jax": mmcl_jax.__version__,
    "JAX_DEFAULT_MATMUL_PRECISION": jax.config.jax_default_matmul_precision,
    **facts,
  }
  mine = {fact: json.dumps(x) for fact, x in facts.items()}
  if here.index == 0:
    here.client.key_value_set(name, json.dumps(mine))
  wait_for_all(f"{name}/come")
  first = json.loads(here.client.blocking_key_value_get(name, WAIT_S * 1000))
  differing = [
    f"{fact} is {mine.get(fact)} here and {first.get(fact)} on host 0"
    for fact in (first | mine)
    if mine.get(fact) != first.get(fact)
  ]
  if differing:
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise UserError(
      f"{'; '.join(differing[:4])}{more}; start the same command on every host, with the same "
      "files and packages"
    )
  wait_for_all(name)  # a host that differs ends all in here


def wait_for_all(barrier: str) -> None:
  """Waits WAIT_S for the slowest host; a UserError names those that have not come as far by
  then."""
  try:
    here.client.wait_at_barrier(barrier, WAIT_S * 1000)
  except Exception as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    late = re.findall(r"\d+", str(error).partition("timed out task names:")[2].partition("[")[0])
    raise UserError(
      f"host {', '.join(late) or '?'} of {here.count} was not as far as host {here.index} within "
      f"{WAIT_S} s; look at its "
      "log: a slow disk, another machine's files, or stuck? the same command goes on"
    ) from None


def meet() -> None:
  """Waits for the slowest host, however long: to be called where hosts have worked apart. A host
  that is lost ends all."""
  if here.count > 1:
    failed, name = [], f"mmcl/meet/{next(rounds)}"

    def wait():
      try:
        here.client.wait_at_barrier(name, MEET_S * 1000)
      except Exception as error:
        failed.append(error)

    waiting = threading.Thread(target=wait, daemon=True)  # the main thread must be free for signals
    waiting.start()
    while waiting.is_alive():
      waiting.join(0.5)
    if failed:
      raise failed[0]


def check_shared(folder: str) -> None:
  """Raises a UserError where `folder`, which is there on every host, is not one that all hosts
  share."""
  if here.count == 1:
    return
  name = f"mmcl/shared/{next(rounds)}"
  if here.index:
    probe = pathlib.Path(folder, here.client.blocking_key_value_get(name, WAIT_S * 1000))
    here.client.key_value_set(f"{name}/{here.index}", "seen" if probe.exists() else "")
    return
  for abandoned in pathlib.Path(folder).glob(".shared-*"):  # by a run that was killed
    abandoned.unlink(missing_ok=True)
  # A new name: no network file system remembers that it was not there.
  probe = pathlib.Path(folder, f".shared-{uuid.uuid4().hex}")
  probe.touch()
  here.client.key_value_set(name, probe.name)
  blind = [
    other
    for other in range(1, here.count)
    if not here.client.blocking_key_value_get(f"{name}/{other}", WAIT_S * 1000)
  ]
  probe.unlink()
  if blind:
    raise UserError(
      f"{folder} of host {', '.join(map(str, blind))} is another folder than that of host 0; "
      "expected one that "
      "all hosts share, on a network file system"
    )


def check_mesh(mesh) -> None:
  """Raises a UserError where hosts have unlike numbers of devices, and so would have unlike parts
  of the batch."""
  owners = [device.process_index for device in mesh.devices.flat]
  counts = [owners.count(host) for host in range(here.count)]
  if len(set(counts)) > 1:
    raise UserError(
      f"the hosts have {', '.join(map(str, counts))} devices; expected the same number on each"
    )


def gather(x: np.ndarray) -> list[np.ndarray]:
  """Every host's array, in their order, on every host; they may differ in length [N, ...]."""
  if here.count == 1:
    return [x]
  from jax.experimental import multihost_utils

  lengths = multihost_utils.process_allgather(np.int32(len(x)))
  padded = np.zeros((max(*lengths, 1), *x.shape[1:]), x.dtype)
  padded[: len(x)] = x
  return [rows[:length] for rows, length in zip(multihost_utils.process_allgather(padded), lengths)]
