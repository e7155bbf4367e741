"""Tells operators apart, and refuses what their roles do not allow.

An operator is an entry of the file of ``--operators``, or of etcd. A token, a certificate, or a token of an issuer that
the file names shows who calls. The file comes first: no entry of etcd changes what it says.
"""

from atserving.operators import Operator
from registry.operators.known import Identity, Operators
from registry.operators.roster import Roster

__all__ = ["Identity", "Operator", "Operators", "Roster"]
