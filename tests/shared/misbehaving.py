"""A tensor that several tests of refusals pass."""


class Misbehaving:
    """A tensor whose DLPack method misbehaves."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __dlpack__(self, **_: object) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer
