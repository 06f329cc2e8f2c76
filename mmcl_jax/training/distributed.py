"""Several hosts as one run: how they find each other, agree before anything is compiled, and end
together.

A host is a process of the run; they are numbered from 0, and host 0 coordinates. They are started
from, in this order,

    --coordinator=HOST:PORT --processes=N --process=I  on every host, I from 0 to N - 1
    SLURM          a step of srun with more than one task
    a TPU slice    GKE's variables or the metadata of a TPU VM, more than one worker

Without any of them there is one process, and nothing is started or waited for (a shell of salloc, a
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
BARRIER_S = 30 * 24 * 3600  # `barrier`: a month, for ever to all intents
ABORT_S = 5  # a host that fails waits so long for the others to have heard it

HELP = """
on several hosts, the same command on each (SLURM's srun and TPU slices need no flags):
  --coordinator=HOST:PORT  address of process 0, a free port
  --processes=N            how many there are
  --process=I              which one this is, 0 to N - 1"""

# sh: says $0 when the pipe breaks
WATCHDOG = 'trap "" HUP INT TERM USR1 USR2; read -r orderly || echo "$0" >&2'


class Host(NamedTuple):
  """This process among the run's, the client of JAX's distributed runtime, and a process that
  reports this one's end if it cannot do so itself (`start_watchdog`)."""

  index: int = 0
  count: int = 1
  client: Any = None
  watchdog: subprocess.Popen | None = None


this_host = Host()
counter = (
  itertools.count()
)  # a key of the store and a barrier are for once; every host counts alike
aborting = threading.Lock()  # held from the moment that this process ends early


@contextlib.contextmanager
def connected(argv: list[str]):
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
  watcher = connect(start)
  try:
    yield rest
  except UserError as error:
    abort_all(2, one_line(error))
  except KeyboardInterrupt as signalled:
    abort_all(status_of(signalled), "interrupted; the same command goes on from what is saved")
  except SystemExit as error:
    if error.code not in (None, 0, os.EX_TEMPFAIL):
      abort_all(error.code if isinstance(error.code, int) else 1, f"ended with status {error.code}")
    shutdown(watcher)  # all hosts come to these together
    raise
  except BaseException as error:
    traceback.print_exc()
    abort_all(1, f"{type(error).__name__}: {one_line(error)[:300]}")
  shutdown(watcher)


def status_of(signalled: KeyboardInterrupt) -> int:
  """The status to end with: 75 (run the command again) after SIGTERM and its like, 130 after
  Ctrl-C."""
  if signalled.args and signalled.args[0] in processes.ENDS:
    return os.EX_TEMPFAIL
  return 130


def flags(argv: list[str]) -> tuple[dict[str, Any] | None, list[str]]:
  """The host flags of `argv`, None where there are none, and the rest of it."""
  given, rest = {}, []
  for arg in argv:
    if match := re.fullmatch("--(coordinator|processes|process)=(.*)", arg):
      given[match[1]] = match[2]
    else:
      rest.append(arg)
  if not given:
    return None, rest
  usage = "expected --coordinator=HOST:PORT --processes=N --process=I, with I from 0 to N - 1"
  forms = {"coordinator": r"\S+:\d{1,5}", "processes": r"\d+", "process": r"\d+"}
  if not all(re.fullmatch(form, given.get(name, "")) for name, form in forms.items()):
    shown = " ".join(f"--{name}={value}" for name, value in given.items())
    raise UserError(f"{shown} does not tell where the other hosts are; {usage}")
  count = int(given["processes"])
  index = int(given["process"])
  if not index < count:
    raise UserError(f"--process={index} is none of --processes={count}; {usage}")
  start = {
    "coordinator_address": given["coordinator"],
    "num_processes": count,
    "process_id": index,
  }
  return start, rest


def how_to_start(given: dict[str, Any] | None, environ) -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize; None: one process, nothing to start."""
  if given:
    if given["num_processes"] == 1:
      return None
    return given | {"cluster_detection_method": "deactivate"}
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
  gpus = len(visible) or int(environ.get("SLURM_GPUS_ON_NODE", 0))
  if not gpus or environ.get("JAX_LOCAL_DEVICE_IDS"):
    return None
  tasks = tasks_of_node(environ)
  local = int(environ["SLURM_LOCALID"])
  if tasks == 1 or gpus < tasks or "SLURM_GPUS_PER_TASK" in environ:
    return list(range(gpus))
  if gpus % tasks:
    raise UserError(
      f"SLURM started {tasks} tasks on a node with {gpus} GPUs; expected as many tasks as GPUs, "
      "one, or a number that divides them (--ntasks-per-node)"
    )
  share = gpus // tasks
  return list(range(local * share, (local + 1) * share))


def tasks_of_node(environ) -> int:
  """Of this node; SLURM lists them as 4(x2),3."""
  counts = []
  for entry in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
    count, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry).groups()
    for _ in range(int(times or 1)):
      counts.append(int(count))
  return counts[int(environ["SLURM_NODEID"])]


def tpu_workers(environ) -> int:
  """Hosts of the TPU slices that this one belongs to; 1 where there is no TPU, or it is not to be
  used (JAX_PLATFORMS)."""
  platforms = environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms:
    return 1
  if not importlib.util.find_spec("libtpu") and not environ.get("TPU_LIBRARY_PATH"):
    return 1
  slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  if names := environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES"):  # GKE
    return len(names.split(",")) * slices
  import jax  # noqa: F401  (sets TPU_SKIP_MDS_QUERY where there is no TPU chip)

  if environ.get("TPU_SKIP_MDS_QUERY"):
    return 1
  if match := re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", metadata("tpu-env")):
    slices = int(match[1])
  workers = metadata("worker-network-endpoints").split(",")
  return len(workers) * slices


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
  """Joins the other hosts; the thread that watches for their ends (`watch_for_abort`)."""
  global this_host
  import jax
  from jax._src import distributed as runtime

  # SIGTERM stays ours (training.signals): JAX's service would keep it from ending a program that
  # never asks for it.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_check_proxy_envs", False)  # a warning of the proxies that are passed by
  address = start.get("coordinator_address", "")
  # else JAX listens on every interface of the machine
  if re.match(r"(127\.|localhost:|\[::1\]:)", address):
    start = start | {"coordinator_bind_address": address}
  where = f" at {address}" if address else ""
  watchdog = start_watchdog(
    f"the hosts did not all come together{where} within {JOIN_S} s; JAX's message above names "
    "those that did not (timed out task names; none: host 0, or its address); start the same "
    "command on every host, with a port that is free on the first"
  )
  try:
    with patched(runtime._jax):
      jax.distributed.initialize(
        **start,
        initialization_timeout=JOIN_S + 15,
        heartbeat_timeout_seconds=HEARTBEAT_S,
      )
  except Exception as error:
    print(one_line(error)[:300], file=sys.stderr, flush=True)
    os._exit(2)  # an ordinary exit would wait for the hosts once more; the watchdog reports it
  except BaseException:
    cancel_watchdog(watchdog)
    raise
  cancel_watchdog(watchdog)
  state = runtime.global_state
  name = f"host {state.process_id} of {state.num_processes}"
  # Nothing in this process can speak when the runtime aborts it, which is how it ends where another
  # host was lost.
  watchdog = start_watchdog(
    f"{name}: ended without a word: killed, out of memory, or aborted because another host was "
    f"lost ({HEARTBEAT_S} s without a sign of it); its log and the other hosts' tell which; the "
    "same command goes on from the last checkpoint"
  )
  this_host = Host(state.process_id, state.num_processes, state.client, watchdog)
  print(
    f"{name} has joined at {state.coordinator_address}; a host that is lost ends all others after "
    f"{HEARTBEAT_S} s",
    flush=True,
  )
  watcher = threading.Thread(target=watch_for_abort, daemon=True)
  watcher.start()
  return watcher


@contextlib.contextmanager
def patched(runtime):
  """Makes JAX's distributed runtime start as this project needs it.

  Its service waits JOIN_S, a time of its own that is shorter than the hosts': then it tells all of
  them who did not come. Its client passes by the proxies of a login profile.
  """
  service = runtime.get_distributed_runtime_service
  client = runtime.get_distributed_runtime_client

  # given or found by JAX, the address is known here
  def client_past_proxies(address, *args, **kwargs):
    os.environ.update(around_proxies(address, os.environ))
    return client(address, *args, **kwargs)

  runtime.get_distributed_runtime_service = functools.partial(
    service,
    cluster_register_timeout=JOIN_S,
  )
  runtime.get_distributed_runtime_client = client_past_proxies
  try:
    yield
  finally:
    runtime.get_distributed_runtime_service = service
    runtime.get_distributed_runtime_client = client


def around_proxies(address: str, environ) -> dict[str, str]:
  """What to add to the environment so that gRPC reaches HOST:PORT itself, not through the proxy of
  a login profile.

  gRPC takes grpc_proxy, https_proxy or http_proxy, but not for the hosts of no_grpc_proxy, or where
  that is not set, of no_proxy (grpc/doc/environment_variables.md). What is there stays.
  """
  if not any(name.lower() in ("grpc_proxy", "https_proxy", "http_proxy") for name in environ):
    return {}
  before = environ.get("no_grpc_proxy", environ.get("no_proxy", ""))
  host = address.rpartition(":")[0].strip("[]")
  return {"no_grpc_proxy": f"{before},{host}" if before else host}


def start_watchdog(text: str) -> subprocess.Popen:
  """A process that prints `text` as an error when this one ends without `cancel_watchdog`."""
  return subprocess.Popen(
    ["sh", "-c", WATCHDOG, f"mmcl: error: {text}"],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
  )


def watch_for_abort() -> None:
  """Ends this process when another host says that it ends early; an empty message is this one's
  own, orderly end."""
  message = None
  while message is None:
    try:
      message = this_host.client.blocking_key_value_get(f"mmcl/end/{this_host.index}", 3600_000)
    except Exception as error:
      if "DEADLINE_EXCEEDED" not in str(error):  # host 0 is lost: JAX ends this process
        return
  if message:
    abort(*json.loads(message))


def abort_all(status: int, reason: str) -> None:
  """Ends all hosts: each prints `reason` under this one's number and exits with `status`."""
  line = f"mmcl: error: host {this_host.index} of {this_host.count}: {reason}"
  message = json.dumps([status, line])
  for other in range(this_host.count):
    with contextlib.suppress(Exception):  # host 0 is lost: JAX ends the others
      this_host.client.key_value_set(f"mmcl/end/{other}", message, allow_overwrite=True)
  abort(status, line)


def abort(status: int, line: str) -> None:
  """Prints the line and ends this process; of two callers in it the first decides. Host 0 lets the
  others hear first."""
  aborting.acquire()

  def say():
    print(line, file=sys.stderr, flush=True)

  def wait():
    this_host.client.wait_at_barrier("mmcl/end", ABORT_S * 1000)

  for step in (say, sys.stdout.flush, cancel_watchdog, wait):
    with contextlib.suppress(Exception):  # nobody reads, or a host is lost
      step()
  if this_host.index == 0:
    time.sleep(1)
  os._exit(status)  # an ordinary exit would wait for hosts that may be stuck in a collective


def shutdown(watcher: threading.Thread) -> None:
  """The orderly end: waits for the other hosts."""
  global this_host
  import jax

  this_host.client.key_value_set(f"mmcl/end/{this_host.index}", "", allow_overwrite=True)
  watcher.join()
  jax.distributed.shutdown()
  cancel_watchdog()
  this_host = Host()


def cancel_watchdog(watchdog: subprocess.Popen | None = None) -> None:
  """Ends this host's watchdog, or the one given, without its message."""
  (watchdog or this_host.watchdog).communicate(b"orderly\n")


def check_same(facts: dict[str, Any]) -> None:
  """Raises a UserError where a fact (JSON) is not the same on every host; called by all of them,
  nothing is compiled."""
  if this_host.count == 1:
    return
  import jax

  name = f"mmcl/facts/{next(counter)}"
  facts = {
    "jax": jax.__version__,
    "mmcl_jax": mmcl_jax.__version__,
    "JAX_DEFAULT_MATMUL_PRECISION": jax.config.jax_default_matmul_precision,
    **facts,
  }
  mine = {fact: json.dumps(x) for fact, x in facts.items()}
  if this_host.index == 0:
    this_host.client.key_value_set(name, json.dumps(mine))
  wait_for_all(f"{name}/come")
  first = json.loads(this_host.client.blocking_key_value_get(name, WAIT_S * 1000))
  differing = []
  for fact in first | mine:
    if mine.get(fact) != first.get(fact):
      differing.append(f"{fact} is {mine.get(fact)} here and {first.get(fact)} on host 0")
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
    this_host.client.wait_at_barrier(barrier, WAIT_S * 1000)
  except Exception as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    _, _, names = str(error).partition("timed out task names:")
    late = re.findall(r"\d+", names.partition("[")[0])
    raise UserError(
      f"host {', '.join(late) or '?'} of {this_host.count} was not as far as host "
      f"{this_host.index} within {WAIT_S} s; look at its log: a slow disk, another machine's "
      "files, or stuck? the same command goes on"
    ) from None


def barrier() -> None:
  """Waits for the slowest host, however long: to be called where hosts have worked apart. A host
  that is lost ends all."""
  if this_host.count == 1:
    return
  name = f"mmcl/barrier/{next(counter)}"
  errors = []

  def wait():
    try:
      this_host.client.wait_at_barrier(name, BARRIER_S * 1000)
    except Exception as error:
      errors.append(error)

  waiting = threading.Thread(target=wait, daemon=True)  # the main thread must be free for signals
  waiting.start()
  while waiting.is_alive():
    waiting.join(0.5)
  if errors:
    raise errors[0]


def check_shared(folder: str) -> None:
  """Raises a UserError where `folder`, which is there on every host, is not one that all hosts
  share."""
  if this_host.count == 1:
    return
  name = f"mmcl/shared/{next(counter)}"
  if this_host.index:
    probe = pathlib.Path(folder, this_host.client.blocking_key_value_get(name, WAIT_S * 1000))
    this_host.client.key_value_set(f"{name}/{this_host.index}", "seen" if probe.exists() else "")
    return
  for abandoned in pathlib.Path(folder).glob(".shared-*"):  # by a run that was killed
    abandoned.unlink(missing_ok=True)
  # A new name: no network file system remembers that it was not there.
  probe = pathlib.Path(folder, f".shared-{uuid.uuid4().hex}")
  probe.touch()
  this_host.client.key_value_set(name, probe.name)
  elsewhere = []
  for other in range(1, this_host.count):
    answer = this_host.client.blocking_key_value_get(f"{name}/{other}", WAIT_S * 1000)
    if not answer:
      elsewhere.append(str(other))
  probe.unlink()
  if elsewhere:
    raise UserError(
      f"{folder} of host {', '.join(elsewhere)} is another folder than that of host 0; expected "
      "one that all hosts share, on a network file system"
    )


def check_mesh(mesh) -> None:
  """Raises a UserError where hosts have unlike numbers of devices, and so would have unlike parts
  of the batch."""
  owners = [device.process_index for device in mesh.devices.flat]
  counts = [owners.count(host) for host in range(this_host.count)]
  if len(set(counts)) > 1:
    raise UserError(
      f"the hosts have {', '.join(map(str, counts))} devices; expected the same number on each"
    )


def gather(x: np.ndarray) -> list[np.ndarray]:
  """Every host's array, in their order, on every host; they may differ in length [N, ...]."""
  if this_host.count == 1:
    return [x]
  from jax.experimental import multihost_utils

  lengths = multihost_utils.process_allgather(np.int32(len(x)))
  padded = np.zeros((max(*lengths, 1), *x.shape[1:]), x.dtype)
  padded[: len(x)] = x
  of_hosts = multihost_utils.process_allgather(padded)
  return [rows[:length] for rows, length in zip(of_hosts, lengths)]
