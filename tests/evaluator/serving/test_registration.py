"""An instance stays registered as long as any registry answers."""

import asyncio

from atserving.config import Instance
from evaluator.serving.registration import Registration
from tests.processes import Registry


def registration_at(registries: list[str], capacity: list[int]) -> Registration:
    return Registration(
        registries,
        lambda: Instance(app="heartbeat", version="v1", id="one", address="10.0.0.1:80", capacity=capacity[0]),
    )


async def capacities(registry: Registry) -> list[int]:
    return [each["capacity"] for each in await asyncio.to_thread(registry.instances, "heartbeat")]


async def test_heartbeat_goes_to_the_next_registry_if_one_is_unreachable(registry: Registry) -> None:
    await asyncio.to_thread(registry.publish, "heartbeat")
    capacity = [4]
    registration = registration_at(["127.0.0.1:1", registry.address], capacity)
    heartbeats = asyncio.create_task(registration.run())
    try:
        while await capacities(registry) != [4]:
            pass
        capacity[0] = 9
        registration.renew()
        while await capacities(registry) != [9]:
            pass
    finally:
        heartbeats.cancel()
        await asyncio.wait({heartbeats})
    await registration.deregister()
    assert await capacities(registry) == []


async def test_next_heartbeat_registers_an_expired_instance_again(registry: Registry) -> None:
    await asyncio.to_thread(registry.publish, "heartbeat")
    registration = registration_at([registry.address], [4])
    heartbeats = asyncio.create_task(registration.run())
    try:
        while await capacities(registry) != [4]:
            pass
        await asyncio.to_thread(registry.delete, "instance/heartbeat/v1/one")
        while await capacities(registry) != [4]:
            pass
    finally:
        heartbeats.cancel()
        await asyncio.wait({heartbeats})


async def test_deregistration_without_a_registry_does_not_hang_or_fail() -> None:
    await registration_at(["127.0.0.1:1", "127.0.0.1:2"], [4]).deregister()
