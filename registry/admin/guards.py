"""Refuses changes that would take an app from its callers, unless they are forced."""

from __future__ import annotations

from atserving.errors import FailedPrecondition
from registry.admin.state import AppState

_FORCE = "use force to do it anyway"


def check(before: AppState, after: AppState) -> None:
    """Refuse the step from one state of an app to another. Raises FailedPrecondition with the reason."""
    _check_deletions(before, after)
    _check_answering(before, after)
    _check_promotions(before, after)
    _check_references(before, after)


def _check_answering(before: AppState, after: AppState) -> None:
    """Refuse to leave requests without a version unanswered."""
    if not after.releases:
        # The app ends. It has no instances, as those were checked.
        return
    if before.serving() and not after.serving():
        raise FailedPrecondition(
            f"app {after.app!r} would have no version in production with a ready instance, and requests that name no "
            f"version would fail; {_FORCE}"
        )
    if before.production() and not after.production():
        raise FailedPrecondition(f"app {after.app!r} would have no version in production; {_FORCE}")


def _check_promotions(before: AppState, after: AppState) -> None:
    """Refuse to let versions answer unversioned requests of which no instance is ready, unless the app is new."""
    answering = {each.version for each in before.production()}
    for release in after.production():
        version = release.version
        if version in answering or after.ready(version):
            continue
        if version not in before.releases and not answering:
            # The first version of an app comes before its instances.
            continue
        raise FailedPrecondition(
            f"no instance of {after.app}/{version} is ready: start one, and promote it then; {_FORCE}"
        )


def _check_deletions(before: AppState, after: AppState) -> None:
    """Refuse to delete what runs."""
    for version in before.versions - after.versions:
        if instances := len(before.instances.get(version, [])):
            raise FailedPrecondition(
                f"{after.app}/{version} still has instances ({instances}), which would answer nobody: stop them first; "
                f"{_FORCE}"
            )


def _check_references(before: AppState, after: AppState) -> None:
    """Refuse to leave an alias or the shadow without its version."""
    for name, version in after.routing.aliases.items():
        target = before.routing.aliases.get(name)
        if version not in after.versions and target == version in before.releases:
            raise FailedPrecondition(f"the alias {name!r} points to {after.app}/{version}: move it first; {_FORCE}")
        if version != target:
            _check_alias(before, after, name, version)
    shadow = after.routing.shadow
    if shadow and shadow != before.routing.shadow:
        release = after.releases.get(shadow.version)
        if release is None or release.phase != "staging":
            raise FailedPrecondition(f"{after.app}/{shadow.version}, the shadow, is no version in staging; {_FORCE}")
    elif shadow:
        release, was = after.releases.get(shadow.version), before.releases.get(shadow.version)
        if was and (release is None or (release.phase != was.phase and release.phase == "production")):
            raise FailedPrecondition(
                f"{after.app}/{shadow.version} is the app's shadow, which stays in staging: end the shadow first; "
                f"{_FORCE}"
            )


def _check_alias(before: AppState, after: AppState, name: str, version: str) -> None:
    """Refuse to let an alias point to a version that can't answer."""
    if version not in after.versions:
        raise FailedPrecondition(f"the alias {name!r}: app {after.app!r} has no version {version!r}; {_FORCE}")
    if name in after.versions:
        raise FailedPrecondition(f"the alias {name!r} is a version of the app, which it would never replace; {_FORCE}")
    was = before.routing.aliases.get(name, "")
    if before.ready(was) and not after.ready(version):
        raise FailedPrecondition(
            f"no instance of {after.app}/{version} is ready, and callers use the alias {name!r}: start one first; "
            f"{_FORCE}"
        )
