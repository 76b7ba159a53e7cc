"""The reviews of authentication.k8s.io and authorization.k8s.io: asked, answered, never stored.

Who is authenticated may do everything, so every access review says yes.
"""

from datetime import datetime

from podwire.apiserver.auth import Authenticator, User
from podwire.model.meta import Json

ALLOWED: Json = {"allowed": True, "reason": "podwire allows everything to everyone it knows"}


def review(kind: str, request: Json, user: User, authenticator: Authenticator, now: datetime) -> Json:
    """The status of a review of `kind` (SelfSubjectAccessReview, TokenReview, …) asked by `user`."""
    match kind:
        case "SelfSubjectReview":
            return {"userInfo": user_info(user)}
        case "TokenReview":
            token = str((request.get("spec") or {}).get("token", ""))
            found = authenticator.by_token(token, now)
            return {"authenticated": False} if found is None else {"authenticated": True, "user": user_info(found)}
        case "SelfSubjectRulesReview":
            rules = [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]
            return {
                "resourceRules": rules,
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
                "incomplete": False,
            }
        case _:
            return ALLOWED


def user_info(user: User) -> Json:
    return {"username": user.name, "groups": list(user.groups)}
