# SPDX-License-Identifier: MIT
"""The owner daemon: puts its parts together, starts all or nothing, ends in bounded time."""

from __future__ import annotations

import asyncio
import datetime
import functools
import hashlib
import ipaddress
import logging
import os
import platform
import pwd
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from banger import guest_binary
from banger.contract import errors, names, privileged, resources
from banger.images import base, catalog
from banger.owner import (
    activity,
    admission,
    app,
    builder,
    clocks,
    config,
    defaults,
    firecracker,
    guest,
    helper,
    identity,
    images,
    inventory,
    kernels,
    locks,
    naming,
    operations,
    publish,
    published,
    pulls,
    reconcile,
    restarts,
    routes,
    runtime,
    server,
    ssh,
    store,
    views,
    vms,
    workspaces,
)
from banger.owner import network as network_keeper
from banger.vm import host, record
from banger.vm.capabilities import dns, file_sync, packet_rules, read_only, work_disk
from banger.vm.capabilities import publish as publishing

if TYPE_CHECKING:
    from banger.images import pull

_log = logging.getLogger(__name__)

_HOST_BOOT_ID: Final = "BANGER_HOST_BOOT_ID"
"""Set by systemd, in the unit."""
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


async def serve(
    settings: config.Config, installation: config.Installation, paths: config.Paths, *, in_process: bool
) -> None:
    """Until SIGTERM or SIGINT. VMs go on running."""
    async with AsyncExitStack() as stack:
        ops = _ops(paths, in_process=in_process)
        services = await stack.enter_async_context(
            compose(
                settings,
                config.prefix(installation),
                paths,
                ops,
                _guest_sha256(),
                network6=config.prefix6(installation),
                bridge=installation.bridge,
                host_boot_id=os.environ.get(_HOST_BOOT_ID, ""),
                make_base=_make_base(paths, in_process=in_process),
            )
        )
        listener = stack.enter_context(server.listening(paths.socket))
        await server.serve(
            app.create_app(services),
            listener,
            stop=_stop_signal(),
            before_shutdown=services.operations.close,
        )


def _registries(settings: config.Config) -> pull.Settings:
    from banger.images import credentials, pull

    return pull.Settings(insecure=settings.insecure_registries, login_files=credentials.own_files())


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def arrived() -> None:
        stop.set()
        for number in _STOPPING:
            loop.remove_signal_handler(number)

    for number in _STOPPING:
        loop.add_signal_handler(number, arrived)
    return stop


def _ops(paths: config.Paths, *, in_process: bool) -> privileged.PrivilegedOps:
    if not in_process:
        return helper.Client(paths.helper_socket, operations.current_op_id.get, tell=operations.note)
    from banger import inprocess  # the helper's code must not be imported by an unprivileged daemon

    return inprocess.InProcess.from_file(paths.install)


def _make_base(paths: config.Paths, *, in_process: bool) -> base.Make:
    """Where banger is installed, what packages bring runs in the builder's unit and not here."""
    if in_process:
        return base.make
    return builder.Builder(paths.builder_socket, operations.current_op_id.get)


@asynccontextmanager
async def compose(
    settings: config.Config,
    network: ipaddress.IPv4Network,
    paths: config.Paths,
    ops: privileged.PrivilegedOps,
    guest_sha256: str,
    *,
    network6: ipaddress.IPv6Network = names.DEFAULT_NETWORK6,
    bridge: str = names.BRIDGE,
    host_boot_id: str = "",
    make_base: base.Make = base.make,
) -> AsyncIterator[routes.Services]:
    """Everything behind the routes, reconciled with the world; ended in reverse order."""
    store.require_rows_for(paths.database, paths.state / "vms")
    rows = store.Store(paths.database)
    running = operations.Operations()
    image_catalog = catalog.Catalog(paths.image_catalog)
    image_service = images.ImageService(
        paths.state / "images",
        paths.cache,
        rows,
        running,
        image_catalog,
        default=settings.image,
        make_base=make_base,
    )
    kernel_service = kernels.KernelService(
        paths.state / "kernels", paths.cache, paths.kernel_catalogs, rows, running
    )
    pull_service = pulls.PullService(
        image_service,
        paths.cache,
        functools.partial(_registries, settings),
        image_catalog,
    )
    pull_service.sweep()
    layout = paths.layout
    keys = ssh.SshKeys(paths.state / "ssh")
    zone = naming.Naming(settings, network, bridge, ops, network6=network6)

    activities = activity.Activities()

    def connect(vm_id: names.VmId) -> guest.GuestClient:
        connector = guest.vsock_connector(layout.vsock_socket(vm_id))
        return guest.GuestClient(connector, activities.of(vm_id))

    lifecycle = locks.Lifecycle()
    keeper = network_keeper.NetworkKeeper(ops, rows, lifecycle)
    machine = host.Host(
        ops=ops,
        records=rows,
        layout=layout,
        network=network,
        network6=network6,
        agent=connect,
        vmm_gone=lambda vm_id: firecracker.wait_gone(layout.api_socket(vm_id)),
        keeper=keeper,
        dns=_guests_dns(settings, network),
        names_closed=naming.names_closed(settings, network),
        guest_sha256=guest_sha256,
        limits=settings.limits,
        boot_id=host_boot_id,
    )
    publisher = publish.Publisher(network, connect)
    workspace_service = workspaces.WorkspaceService(rows, connect)
    vm_service = vms.VmService(
        host=machine,
        store=rows,
        operations=running,
        lifecycle=lifecycle,
        resolver=defaults.Defaults(settings, image_service, kernel_service, pull_service),
        views=views.Views(layout, network, network6, image_service.name, kernel_service.name),
        connect=connect,
        features=(
            work_disk.WorkDisk(keys.public_key, _git_config),
            packet_rules.PacketRules(),
            dns.Dns(zone),
            *_file_sync(settings),
            read_only.ReadOnly(workspace_service.guard),
            publishing.Publish(publisher),
        ),
        publisher=publisher,
        keys=keys,
        zone=zone,
        activities=activities,
        memory=admission.Memory(settings.vms_memory_mib or admission.host_memory_mib(), rows.list),
    )
    port_keeper = published.PortKeeper(publisher, rows, lifecycle)
    holdings = inventory.Inventory(
        machine,
        rows,
        vm_service.endings,
        running,
        inventory.Places(paths.state, paths.cache, bridge),
        lambda: image_service.records.names() | kernel_service.names(),
    )
    with_host = restarts.Restarts(vm_service, rows, running, host_boot_id)
    silent_since = vm_service.endings.live.agents.silent_since
    times = clocks.Clocks(lambda: [vm for vm in _running(rows) if not silent_since(vm.id)], connect)
    try:
        await asyncio.to_thread(holdings.sweep)
        await zone.start()
        await reconcile.reconcile(rows, machine, vm_service.endings)
        await _restore_network(keeper, rows)
        await port_keeper.look()
        port_keeper.start()
        keeper.start()
        times.start()
        vm_service.lifetimes.start()
        await zone.ensure_routed()
        with_host.start()
        yield routes.Services(
            vms=vm_service,
            alterations=vm_service.alterations,
            sessions=vm_service.sessions,
            workspaces=workspace_service,
            images=image_service,
            pulls=pull_service,
            kernels=kernel_service,
            operations=running,
            ops=ops,
            ssh=keys,
            naming=zone,
            inventory=holdings,
            restarts=with_host,
            runtime=runtime.RuntimeService(paths.helper_dir / "runtime", paths.cache, running),
            started_at=datetime.datetime.now(datetime.UTC),
        )
    finally:
        await with_host.close()
        await times.close()
        await keeper.close()
        await running.close()
        await port_keeper.close()
        await publisher.close()
        await vm_service.close()
        await zone.close()
        rows.close()


def _running(rows: store.Store) -> list[record.VmRecord]:
    return [vm for vm in rows.list() if vm.state is resources.VmState.RUNNING]


async def _restore_network(keeper: network_keeper.NetworkKeeper, rows: store.Store) -> None:
    """A daemon that was killed may have saved a row and not done what it says."""
    if network_keeper.networked(rows):
        try:
            await keeper.ensure()
        except errors.BangerError as error:
            _log.error("the network of running VMs is not as it should be", extra={"error": error.message})
        await keeper.restore()


def _guests_dns(settings: config.Config, network: ipaddress.IPv4Network) -> tuple[str, ...]:
    """What the configuration says, else us."""
    ours = settings.dns_guests and settings.dns_endpoint is not None
    return settings.dns or ((str(names.bridge_address(network)),) if ours else ())


def _file_sync(settings: config.Config) -> Iterator[file_sync.FileSync]:
    """Nothing that does nothing shows in a start."""
    if settings.file_sync:
        yield file_sync.FileSync(_home(), [each.entry for each in settings.file_sync])


def _git_config() -> bytes:
    try:
        return identity.git_config(_home())
    except KeyError:  # a user whom the system does not know
        return b""


def _home() -> Path:
    """As the system knows it: HOME may be anything."""
    return Path(pwd.getpwuid(os.getuid()).pw_dir)


def _guest_sha256() -> str:
    return hashlib.sha256(guest_binary.path(platform.machine()).read_bytes()).hexdigest()
