"""An instance stays registered over whichever registry answers."""

import asyncio

from atserving.config import Instance
from evaluator.serving.registration import Registration
from tests.processes import Registry


def registration(registries: list[str], capacity: list[int]) -> Registration:
    return Registration(
        registries,
        lambda: Instance(app="heart", version="v1", id="one", address="10.0.0.1:80", capacity=capacity[0]),
    )


async def capacities(registry: Registry) -> list[int]:
    return [each["capacity"] for each in await asyncio.to_thread(registry.instances, "heart")]


async def test_a_registry_that_is_away_gives_way_to_the_next(registry: Registry) -> None:
    await asyncio.to_thread(registry.publish, "heart")
    capacity = [4]
    heart = registration(["127.0.0.1:1", registry.address], capacity)
    beating = asyncio.create_task(heart.run())
    try:
        while await capacities(registry) != [4]:
            pass
        capacity[0] = 9
        heart.renew()
        while await capacities(registry) != [9]:
            pass
    finally:
        beating.cancel()
        await asyncio.wait({beating})
    await heart.deregister()
    assert await capacities(registry) == []


async def test_an_instance_that_lapsed_is_registered_again_by_its_next_heartbeat(registry: Registry) -> None:
    await asyncio.to_thread(registry.publish, "heart")
    heart = registration([registry.address], [4])
    beating = asyncio.create_task(heart.run())
    try:
        while await capacities(registry) != [4]:
            pass
        await asyncio.to_thread(registry.delete, "instance/heart/v1/one")
        while await capacities(registry) != [4]:
            pass
    finally:
        beating.cancel()
        await asyncio.wait({beating})


async def test_leaving_without_any_registry_does_not_hang_or_fail() -> None:
    await registration(["127.0.0.1:1", "127.0.0.1:2"], [4]).deregister()
