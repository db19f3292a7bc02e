"""Runs inside two sandboxes: as `serve` around an untrusted program, as `judge` around its tests.

The judge calls the program's functions through stand-ins that send the arguments to the other
sandbox as JSON and get plain data back, so a test sees numbers, strings and containers of them, and
never an object whose equality, or anything else, the program defined.

`serve` shares an interpreter with the program, which may do to it what it likes: all it gains is to
answer with other data, which it may do anyway.
"""

import builtins
import json
import os
import sys
import types

REQUESTS, ANSWERS = 3, 4  # on either side
LONGEST = 1 << 24  # bytes of one message


class Broken(Exception):
    """The program gave no answer that a test could use."""


# Plain data as JSON: an object has one key, the name of a type that JSON does not have.


def pack(value):
    """Subclasses become their plain base; TypeError for anything that is not plain data."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": hex(value)} if abs(value) >= 2**53 else int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [pack(value.real), pack(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {type_name(value, bytes, bytearray): bytes(value).hex()}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple | set | frozenset):
        return {type_name(value, tuple, set, frozenset): [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    raise TypeError(f"{type(value).__name__} is not plain data")


def type_name(value, *bases) -> str:
    return next(base.__name__ for base in bases if isinstance(value, base))


def unpack(value):
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "int":
            return int(content, 16)
        case "complex":
            return complex(*map(unpack, content))
        case "bytes" | "bytearray":
            return getattr(builtins, kind).fromhex(content)
        case "tuple" | "set" | "frozenset":
            return getattr(builtins, kind)(map(unpack, content))
        case "dict":
            return {unpack(k): unpack(v) for k, v in content}
        case "range":
            return range(*content)
    raise Broken(f"an answer of unknown kind {str(kind)[:80]!r}")


def send(descriptor: int, message) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def receive(pipe):
    line = pipe.readline(LONGEST)
    if not line.endswith(b"\n"):
        raise Broken("the program ended without an answer" if len(line) < LONGEST else "too long")
    return json.loads(line)


def execute(path: str, namespace: dict) -> None:
    with open(path, "rb") as file:
        exec(compile(file.read(), os.path.basename(path), "exec"), namespace)


def show(error: BaseException) -> None:
    # What the interpreter does by itself; the traceback module would take longer to import.
    sys.__excepthook__(type(error), error, error.__traceback__)


def serve(folder: str) -> None:
    """Answers ["value", ...] or ["error", names of the exception's classes, message]."""
    requests = os.fdopen(REQUESTS, "rb")
    module = types.ModuleType("program")
    sys.modules["program"] = module
    call = None  # the first answer is about loading
    while True:
        try:
            if call is None:
                execute(f"{folder}/program.py", module.__dict__)
                answer: list = ["value", None]
            else:
                name, arguments, named = call
                function = getattr(module, name)
                answer = ["value", pack(function(*unpack(arguments), **unpack(named)))]
        except BaseException as error:
            show(error)
            names = [each.__name__ for each in type(error).__mro__]
            answer = ["error", names, str(error)[:1000]]
        sys.stdout.flush()
        send(ANSWERS, answer)
        try:
            call = receive(requests)
        except Broken:
            return


def judge(folder: str, names: list[str]) -> None:
    """Ends the process with 0 if the tests ran to their end, and every call got an answer."""
    answers = os.fdopen(ANSWERS, "rb")
    broken: list[str] = []

    def answer(request=None):
        """Tests that catch every exception must not take a missing answer for an expected one:
        whatever goes wrong here is kept, and fails them in the end."""
        try:
            if request:
                send(REQUESTS, [pack(part) for part in request])
            match receive(answers):
                case ["value", value]:
                    return unpack(value)
                case ["error", [*classes], str(message)]:
                    error = builtin_exception(classes, message)
                case _:
                    raise Broken("the program sent a damaged answer")
        except BaseException as problem:
            broken.append(f"{type(problem).__name__}: {problem}")
            raise
        raise error

    def stand_in(name: str):
        return lambda *arguments, **named: answer([name, list(arguments), named])

    try:
        answer()
        namespace: dict = {"__name__": "tests"}
        execute(f"{folder}/setup.py", namespace)
        namespace.update({name: stand_in(name) for name in names})
        execute(f"{folder}/tests.py", namespace)
        if broken:
            raise Broken(broken[0])
    except BaseException as error:
        show(error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(f"\n{reason[:500]}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def builtin_exception(classes: list, message: str) -> Exception:
    """Of the first of these classes that Python has; SystemExit and its like are none for tests."""
    for name in classes:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(message)
            except TypeError:  # takes more than a message, as UnicodeDecodeError does
                continue
    raise Broken(f"the program raised {classes[:1]}: {message}")


if __name__ == "__main__":
    script, role, *names = sys.argv
    folder = os.path.dirname(script)
    if role == "serve":
        serve(folder)
    else:
        judge(folder, names)
