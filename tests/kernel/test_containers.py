"""Containers as processes: what they share, what they see, how they end."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from podrig import Objects, Rig, make_pod, rig, shell, until

from podwire.model.objects import Pod
from podwire.model.podruntime import PodReport
from podwire.runtime.prober import run_command

pytestmark = pytest.mark.kernel

STAND_IN = {"name": "web", "image": "nginx", "ports": [{"containerPort": 8080, "name": "http"}]}


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


def exists(path: str) -> bool:
    return Path(path).exists()


def done(report: PodReport) -> bool:
    return report.phase in ("Succeeded", "Failed")


async def output_of(shim: Rig, container: dict[str, Any], objects: Objects | None = None, **spec: Any) -> str:
    """Run one container to its end and return what it wrote."""
    node = shim.node()
    pod = make_pod("once", container, restartPolicy="Never", **spec)
    await node.run(pod, objects)
    report = await node.report(pod, done)
    text = shim.log(pod)
    assert report.phase == "Succeeded", (report, text)
    await node.end(pod)
    return text


async def test_containers_of_a_pod_reach_each_other_on_localhost(shim: Rig) -> None:
    node = shim.node()
    client = "exec 3<>/dev/tcp/127.0.0.1/8080; printf 'GET /hostname HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3; echo"
    pod = make_pod("web", STAND_IN, {"name": "main", "command": ["bash", "-c", client]}, restartPolicy="Never")
    await node.run(pod)
    report = await node.report(pod, lambda report: "terminated" in report.container_statuses[1]["state"])
    assert report.container_statuses[1]["state"]["terminated"]["exitCode"] == 0, shim.log(pod)
    assert shim.log(pod).endswith("web\n")
    assert '127.0.0.1 - "GET /hostname HTTP/1.0" 200 3\n' in shim.log(pod, "web")
    await node.end(pod)


async def test_a_container_is_process_1_and_sees_only_its_own(shim: Rig) -> None:
    text = await output_of(shim, shell("echo $$$$; echo /proc/[0-9]*; hostname; pwd; id -u"), hostname="www")
    assert text == "1\n/proc/1\nwww\n/\n0\n"


async def test_containers_see_each_other_where_process_ids_are_shared(shim: Rig) -> None:
    script = "test $(cat /proc/1/comm) = pause && test $$$$ != 1 && echo shared"
    assert await output_of(shim, shell(script), shareProcessNamespace=True) == "shared\n"


async def test_environment_directory_and_arguments(shim: Rig, tmp_path: Path) -> None:
    container = {
        "name": "main",
        "command": ["sh", "-c", 'echo "$A $0 $1"; pwd', "$(A)"],
        "args": ["$(B)x"],
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2"}],
        "workingDir": "/nowhere/yet",
    }
    assert await output_of(shim, container) == "1 1 12x\n/nowhere/yet\n"
    assert not exists("/nowhere")


@pytest.mark.parametrize("target", ["/data", "/etc/nginx/conf.d", "/tmp", "/var/lib/app/deep/er", "/usr/share/nginx/html"])
async def test_a_config_map_can_be_mounted_anywhere(shim: Rig, target: str) -> None:
    existed = exists(target)
    container = shell(
        f"cat {target}/a.conf; ls /bin/sh /usr/bin/env /dev/null; (echo y > {target}/new) 2>/dev/null || echo read-only",
        volumeMounts=[{"name": "v", "mountPath": target, "readOnly": True}],
    )
    objects = Objects({"cm": {"a.conf": "hello\n"}})
    text = await output_of(shim, container, objects, volumes=[{"name": "v", "configMap": {"name": "cm"}}])
    assert text == "hello\n/bin/sh\n/dev/null\n/usr/bin/env\nread-only\n"
    assert exists(target) == existed


async def test_volumes_within_volumes_and_single_files(shim: Rig) -> None:
    mounts = [
        {"name": "scratch", "mountPath": "/srv/site"},
        {"name": "cm", "mountPath": "/srv/site/conf/live"},
        {"name": "cm", "mountPath": "/etc/motto.txt", "subPath": "motto.txt"},
    ]
    container = shell(
        "cat /srv/site/conf/live/motto.txt /etc/motto.txt; echo x > /srv/site/x && ls /srv/site", volumeMounts=mounts
    )
    volumes = [{"name": "scratch", "emptyDir": {}}, {"name": "cm", "configMap": {"name": "cm"}}]
    assert await output_of(shim, container, Objects({"cm": {"motto.txt": "m\n"}}), volumes=volumes) == "m\nm\nconf\nx\n"
    assert not exists("/etc/motto.txt")


async def test_the_pod_has_its_own_names_in_etc(shim: Rig) -> None:
    text = await output_of(shim, shell("grep once /etc/hosts /etc/hostname; grep search /etc/resolv.conf"))
    assert text.splitlines()[-1] == "search shop.svc.cluster.local svc.cluster.local cluster.local"
    assert "/etc/hosts:127.0.0.1\tonce" in text
    assert "/etc/hostname:once" in text


async def test_an_empty_directory_is_shared_by_the_pods_containers(shim: Rig) -> None:
    node = shim.node()
    mounts = [{"name": "v", "mountPath": "/shared"}]
    writer = shell("echo from init > /shared/x", "init", volumeMounts=mounts)
    pod = make_pod(
        "shared",
        shell("cat /shared/x", volumeMounts=mounts),
        initContainers=[writer],
        volumes=[{"name": "v", "emptyDir": {}}],
        restartPolicy="Never",
    )
    await node.run(pod)
    report = await node.report(pod, done)
    assert shim.log(pod) == "from init\n"
    assert report.init_container_statuses[0]["state"]["terminated"]["reason"] == "Completed"
    await node.end(pod)


async def test_a_missing_config_map_is_waited_for(shim: Rig) -> None:
    node, objects = shim.node(), Objects()
    source = {"configMapRef": {"name": "late"}}
    pod = make_pod("web", shell("echo $COLOR; sleep 1000", envFrom=[source]))
    await node.run(pod, objects)

    def waits(report: PodReport) -> bool:
        waiting = report.container_statuses[0]["state"].get("waiting", {})
        return bool(waiting.get("reason") == "CreateContainerConfigError")

    report = await node.report(pod, waits)
    assert report.container_statuses[0]["state"]["waiting"]["message"] == 'configmap "late" not found'
    assert report.phase == "Pending"
    objects.config_maps["late"] = {"COLOR": "red"}
    await node.ready(pod)
    await node.end(pod)


async def test_a_volume_of_a_kind_that_is_not_there_keeps_the_pod_from_starting(shim: Rig) -> None:
    node = shim.node()
    claimed = [{"name": "data", "persistentVolumeClaim": {"claimName": "orders"}}]
    pod = make_pod("db", shell("sleep 1000"), shell("sleep 1000", "other"), volumes=claimed)
    await node.run(pod)
    await node.until(lambda: bool(node.events("FailedMount")))
    event = node.events("FailedMount")[0]
    assert event.type == "Warning"
    assert event.message == (
        'MountVolume.SetUp failed for volume "data" : podwire does not have volumes of kind persistentVolumeClaim'
    )
    report = await node.report(pod, lambda r: "waiting" in r.container_statuses[0]["state"])
    assert report.phase == "Pending"
    assert report.container_statuses[0]["state"]["waiting"] == {"reason": "ContainerCreating"}
    await node.end(pod)


async def test_a_command_that_does_not_exist_is_told_as_kubelet_tells_it(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("bad", {"name": "main", "command": ["no-such-program"]}, restartPolicy="Never")
    await node.run(pod)
    report = await node.report(pod, done)
    ended = report.container_statuses[0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert ended["message"] == 'exec: "no-such-program": executable file not found in $PATH'
    assert report.phase == "Failed"
    await node.end(pod)


async def test_exec_runs_beside_the_main_process_and_in_stand_ins(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("web", STAND_IN, shell("exec sleep 1000", volumeMounts=[{"name": "v", "mountPath": "/data"}]),
                   volumes=[{"name": "v", "configMap": {"name": "cm"}}])  # fmt: skip
    await node.run(pod, Objects({"cm": {"k": "v"}}))
    await node.ready(pod)
    runtime = node.runtime
    main, stand_in = (runtime.run_of("shop", "web", name) for name in ("main", "web"))
    assert main is not None
    assert stand_in is not None
    assert await run_command(runtime.client, main, ("sh", "-c", "hostname; cat /data/k; exit 3")) == (3, b"web\nv")
    assert await run_command(runtime.client, main, ("cat", "/proc/1/comm")) == (0, b"sleep\n")
    assert await run_command(runtime.client, stand_in, ("sh", "-c", "hostname; cat /etc/hostname")) == (0, b"web\nweb\n")
    code, _ = await run_command(runtime.client, main, ("sh", "-c", "kill -9 $$"))
    assert code == 137
    await node.end(pod)


async def test_no_descriptor_of_the_shim_leaks_into_containers(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("web", shell("exec sleep 1000"))
    await node.run(pod)
    await node.ready(pod)
    record = node.runtime.run_of("shop", "web", "main")
    assert record is not None
    assert sorted(os.listdir(f"/proc/{record.pid}/fd")) == ["0", "1", "2"]
    await node.end(pod)


async def test_sigterm_then_sigkill_after_the_grace(shim: Rig) -> None:
    node = shim.node()
    polite = shell("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done", "polite")
    deaf = shell("trap '' TERM; echo up; while :; do sleep 0.05; done", "deaf")
    pod = make_pod("web", polite, deaf)
    await node.run(pod)
    await until_logged(shim, pod, "polite", "up")
    await until_logged(shim, pod, "deaf", "up")
    await node.runtime.stop(pod.metadata.uid, 1)
    report = await node.report(pod, done)
    states = {status["name"]: status["state"]["terminated"] for status in report.container_statuses}
    assert (states["polite"]["exitCode"], states["deaf"]["exitCode"]) == (0, 137)
    assert report.phase == "Failed"
    assert shim.log(pod, "polite") == "up\nbye\n"
    await node.runtime.remove(pod.metadata.uid)


async def test_a_second_stop_with_less_grace_hurries_the_first(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("web", shell("trap '' TERM; echo up; while :; do sleep 0.05; done"))
    await node.run(pod)
    await until_logged(shim, pod, "main", "up")
    slow = asyncio.create_task(node.runtime.stop(pod.metadata.uid, 1000))
    await asyncio.sleep(0)
    await node.runtime.stop(pod.metadata.uid, 0)
    await slow
    await node.runtime.remove(pod.metadata.uid)


async def test_pre_stop_and_post_start_hooks_run_in_the_container(shim: Rig) -> None:
    node = shim.node()
    hooks = {
        "postStart": {"exec": {"command": ["sh", "-c", "echo started > /proc/1/fd/1"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "echo stopping > /proc/1/fd/1"]}},
    }
    pod = make_pod("web", shell("trap 'echo term; exit 0' TERM; while :; do sleep 0.05; done", lifecycle=hooks))
    await node.run(pod)
    await node.ready(pod)
    await until_logged(shim, pod, "main", "started")
    await node.runtime.stop(pod.metadata.uid, 10)
    assert shim.log(pod) == "started\nstopping\nterm\n"
    await node.runtime.remove(pod.metadata.uid)


async def test_a_sidecar_starts_first_and_ends_last(shim: Rig) -> None:
    node = shim.node()
    script = "trap 'echo last >> /shared/x; exit 0' TERM; echo first > /shared/x; while :; do sleep 0.05; done"
    mounts = [{"name": "v", "mountPath": "/shared"}]
    sidecar = shell(script, "side", restartPolicy="Always", volumeMounts=mounts,
                    startupProbe={"exec": {"command": ["test", "-e", "/shared/x"]}})  # fmt: skip
    main = shell("cat /shared/x; echo main >> /shared/x", volumeMounts=mounts)
    pod = make_pod("job", main, initContainers=[sidecar], volumes=[{"name": "v", "emptyDir": {}}], restartPolicy="Never")
    await node.run(pod)
    report = await node.report(pod, lambda r: r.phase == "Succeeded" and "terminated" in r.init_container_statuses[0]["state"])
    assert shim.log(pod) == "first\n"
    assert report.init_container_statuses[0]["state"]["terminated"]["exitCode"] == 0
    shared = shim.root / "node-1" / "pods" / pod.metadata.uid / "volumes" / "v" / "x"
    assert shared.read_text() == "first\nmain\nlast\n"
    await node.end(pod)


async def until_logged(shim: Rig, pod: Pod, container: str, text: str) -> None:
    """Wait until the container has written something."""

    def written() -> bool:
        try:
            return text in shim.log(pod, container)
        except FileNotFoundError:
            return False

    await until(written)
