"""A guest of 512 bytes: a boot sector that counts in RAM and writes each number to a serial line.

It shows what a live update must keep. The count is in a register (QEMU's device state) and in a
word of RAM: a guest that is given one of them without the other says ``torn`` and stops. It is
paced by the timer's interrupt, so the timer and its interrupt controller have to go on, too. A
guest that has been reset instead says ``boot`` again. Run it with ``-M pc -boot a``.

Whatever a device stores at one address, the guest's processor stores at another: it has seen it.
"""

import re

FLOPPY_BYTES = 1440 << 10
#: The guest's physical address of the count, 4 bytes.
COUNT_ADDRESS = 0x8000
#: The last RING_WORDS numbers, number N in word N modulo RING_WORDS, 4 bytes each.
RING_ADDRESS = 0x10000
RING_WORDS = 0x4000
#: What a device stores at the first address, 4 bytes, the guest stores at the second.
MAILBOX_ADDRESS = 0x9000
SEEN_ADDRESS = 0x9008
HERTZ = 100
BOOT, TORN = "boot", "torn"

_ORIGIN = 0x7C00
_SECTOR_BYTES = 512

# 16-bit code, one instruction a line: label, bytes, what they mean. >x is the distance to the label
# x in one byte, >>x in two, =x is its address.
SOURCE = """
start:  fa              | cli
        31 c0           | xor ax, ax
        8e d8           | mov ds, ax
        8e d0           | mov ss, ax
        bc 00 7c        | mov sp, 0x7c00
        b8 00 10        | mov ax, 0x1000
        8e c0           | mov es, ax            ; the ring
        b0 34           | mov al, 0x34          ; timer 0: rate generator, two bytes
        e6 43           | out 0x43, al
        b0 9c           | mov al, 0x9c          ; 1193182 Hz / 0x2e9c is 100 Hz
        e6 40           | out 0x40, al
        b0 2e           | mov al, 0x2e
        e6 40           | out 0x40, al
        66 31 db        | xor ebx, ebx          ; the count
        66 89 1e 00 80  | mov [0x8000], ebx     ; the count in RAM
        be =boot        | mov si, boot
        e8 >>puts       | call puts
        fb              | sti
again:  f4              | hlt                   ; until the timer's interrupt
        66 43           | inc ebx
        66 ff 06 00 80  | inc dword [0x8000]
        66 3b 1e 00 80  | cmp ebx, [0x8000]
        75 >differ      | jne differ
        89 df           | mov di, bx
        c1 e7 02        | shl di, 2
        26 66 89 1d     | mov es:[di], ebx
        66 a1 00 90     | mov eax, [0x9000]     ; what a device has stored there,
        66 a3 08 90     | mov [0x9008], eax     ; the guest has seen
        66 89 da        | mov edx, ebx
        b9 08 00        | mov cx, 8
digit:  66 c1 c2 04     | rol edx, 4
        88 d0           | mov al, dl
        24 0f           | and al, 0x0f
        3c 0a           | cmp al, 10
        1c 69           | sbb al, 0x69
        2f              | das                   ; 0..15 is '0'..'9', 'A'..'F'
        e8 >>putc       | call putc
        e2 >digit       | loop digit
        b0 0a           | mov al, 10
        e8 >>putc       | call putc
        eb >again       | jmp again
differ: be =torn        | mov si, torn
        e8 >>puts       | call puts
        fa              | cli
        f4              | hlt
puts:   ac              | lodsb
        84 c0           | test al, al
        74 >done        | jz done
        e8 >>putc       | call putc
        eb >puts        | jmp puts
done:   c3              | ret
putc:   52              | push dx
        50              | push ax
        ba fd 03        | mov dx, 0x3fd         ; line status of COM1
busy:   ec              | in al, dx
        a8 20           | test al, 0x20         ; can it take a byte?
        74 >busy        | jz busy
        58              | pop ax
        ba f8 03        | mov dx, 0x3f8
        ee              | out dx, al
        5a              | pop dx
        c3              | ret
boot:   62 6f 6f 74 0a 00                       | "boot\\n"
torn:   74 6f 72 6e 0a 00                       | "torn\\n"
"""

_LINE = re.compile(r"(?:(\w+):)?\s*([^|]*?)\s*\|.*")


def floppy() -> bytes:
    """The image of a floppy disk that boots the guest."""
    code = assemble(SOURCE)
    if len(code) > _SECTOR_BYTES - 2:
        raise ValueError(f"boot sector too long: got {len(code)} bytes")
    sector = code.ljust(_SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"
    return sector.ljust(FLOPPY_BYTES, b"\0")


def assemble(source: str) -> bytes:
    """The bytes of a source as above, to be run at 0x7c00.

    :raises ValueError: a line is no instruction, or a jump goes too far.
    :raises KeyError: there is no such label.
    """
    labels: dict[str, int] = {}
    words: list[tuple[int, str]] = []
    at = _ORIGIN
    for line in filter(None, source.splitlines()):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"not an instruction: {line!r}")
        if match[1]:
            labels[match[1]] = at
        for word in match[2].split():
            words.append((at, word))
            at += 2 if word.startswith((">>", "=")) else 1
    return b"".join(_encode(at, word, labels) for at, word in words)


def _encode(at: int, word: str, labels: dict[str, int]) -> bytes:
    if word.startswith("="):
        return labels[word[1:]].to_bytes(2, "little")
    size = 2 if word.startswith(">>") else 1
    if word.startswith(">"):
        distance = labels[word.lstrip(">")] - (at + size)
        try:
            return distance.to_bytes(size, "little", signed=True)
        except OverflowError:
            raise ValueError(f"too far: {word}") from None
    return bytes.fromhex(word)


def numbers(serial: str) -> list[int]:
    """The numbers that the guest has written, of complete lines only.

    :raises ValueError: anything but one ``boot`` and then numbers: the guest was reset or torn.
    """
    complete = serial[: serial.rfind("\n") + 1].splitlines()
    if not complete:
        return []
    if complete[0] != BOOT:
        raise ValueError(f"counter: got {complete[0]!r} first, expected {BOOT!r}")
    for line in complete[1:]:
        if not re.fullmatch("[0-9A-F]{8}", line):
            raise ValueError(f"counter: got {line!r} among its numbers")
    return [int(line, 16) for line in complete[1:]]
