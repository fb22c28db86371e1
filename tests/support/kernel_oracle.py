"""The kernel's own code for memmap= in two small programs: what it says is what the model must say.

The code comes from Debian's kernel sources when a test runs (:mod:`kexeclab.sources`): whole files,
or functions by their names. What is around them in the kernel is replaced by a few declarations.
A program is asked one line for each command line, and answers it in a process of its own, because
the code keeps its state in static variables.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from kexeclab.sources import Sources

FILES = (
    "arch/x86/boot/cmdline.c",
    "arch/x86/boot/compressed/cmdline.c",
    "arch/x86/boot/compressed/kaslr.c",
    "arch/x86/boot/ctype.h",
    "arch/x86/boot/string.c",
    "arch/x86/include/asm/e820/types.h",
    "arch/x86/kernel/e820.c",
    "include/linux/ctype.h",
    "init/main.c",
    "kernel/params.c",
    "lib/cmdline.c",
    "lib/ctype.c",
    "lib/kstrtox.c",
    "lib/kstrtox.h",
    "lib/vsprintf.c",
)
#: What kaslr.c is told of the machine: bytes. MAXMEM is that of five levels of page tables.
MINIMUM = 16 << 20
ALIGN = 2 << 20

_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](.+)[>"].*$', re.MULTILINE)

_TYPES = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned u32; typedef int s32;
typedef short s16; typedef unsigned long long u64; typedef unsigned long size_t; typedef u32 __u32;
typedef u64 __u64; typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
#define EINVAL 22
#define ERANGE 34
#define ENOENT 2
#define ENOSPC 28
#define EPERM 1
#define INT_MAX 0x7fffffff
#define ULLONG_MAX (~0ULL)
#define __init
#define __initdata
#define __always_inline inline
#define noinline
#define noinline_for_stack
#define __ro_after_init
#define fallthrough do {} while (0)
#define likely(x) (x)
#define unlikely(x) (x)
#define EXPORT_SYMBOL(x)
#define EXPORT_SYMBOL_GPL(x)
#define ARRAY_SIZE(x) (sizeof(x) / sizeof((x)[0]))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define max_t(t, a, b) ((t)(a) > (t)(b) ? (t)(a) : (t)(b))
#define clamp(x, low, high) min(max(x, low), high)
#define check_add_overflow(a, b, d) __builtin_add_overflow(a, b, d)
#define check_sub_overflow(a, b, d) __builtin_sub_overflow(a, b, d)
#define check_mul_overflow(a, b, d) __builtin_mul_overflow(a, b, d)
#define check_shl_overflow(a, s, d) \\
    ({ u64 a_ = (a); u32 s_ = (s); *(d) = a_ << s_; (*(d) >> s_) != a_; })
u64 simple_strtoull(const char *, char **, unsigned int);
long simple_strtol(const char *, char **, unsigned int);
int strcmp(const char *, const char *);
int strncmp(const char *, const char *, size_t);
char *strchr(const char *, int);
char *strstr(const char *, const char *);
size_t strlen(const char *);
size_t strnlen(const char *, size_t);
void *memcpy(void *, const void *, size_t);
void *memset(void *, int, size_t);
void *malloc(size_t);
void free(void *);
char *skip_spaces(const char *);
"""

_BOOT_STRING = """
#define CC_SET(c) ""
#define CC_OUT(c) "=@cc" #c
"""

_BOOT = """
#define CONFIG_X86_64 1
#define ENABLED_1 0,
#define ENABLED_SECOND(a, b, ...) b
#define ENABLED__(x) ENABLED_SECOND(x 1, 0, 0)
#define ENABLED_(x) ENABLED__(ENABLED_##x)
#define IS_ENABLED(x) ENABLED_(x)
#define UTS_RELEASE ""
#define LINUX_COMPILE_BY ""
#define LINUX_COMPILE_HOST ""
#define LINUX_COMPILER ""
#define UTS_VERSION ""
#define COMMAND_LINE_SIZE 2048
#define CONFIG_PHYSICAL_ALIGN 0x200000UL
#define LOAD_PHYSICAL_ADDR 0x1000000UL
#define KERNEL_IMAGE_SIZE (1UL << 30)
#define MAXMEM (1UL << 52)
#define PUD_SHIFT 30
#define PUD_SIZE (1UL << 30)
#define KASLR_FLAG 2
#define E820_TYPE_RAM 1
#define SETUP_INDIRECT (1U << 31)
#define SETUP_KEXEC_KHO 10
#define EFI_MEMORY_SP 0x40000ULL
#define ALIGN_DOWN(x, a) ((x) & ~((__typeof__(x))(a) - 1))
#define ALIGN(x, a) ALIGN_DOWN((x) + (a) - 1, a)
#define warn(x)
#define debug_putstr(x)
#define error(x) __builtin_trap()
struct mem_vector { u64 start, size; };
struct setup_data { u64 next; u32 type, len; u8 data[]; };
struct setup_indirect { u32 type, reserved; u64 len, addr; };
struct kho_data { u64 fdt_addr, fdt_size, scratch_addr, scratch_size; };
struct kho_scratch { u64 addr, size; };
struct boot_e820_entry { u64 addr, size; u32 type; };
struct boot_params {
    struct { u32 init_size, ramdisk_image, ramdisk_size, cmd_line_ptr, loadflags; u64 setup_data; }
        hdr;
    u32 ext_ramdisk_image, ext_ramdisk_size, ext_cmd_line_ptr, e820_entries;
    struct boot_e820_entry e820_table[128];
};
static struct boot_params the_boot_params, *boot_params_ptr = &the_boot_params;
int kstrtoull(const char *, unsigned int, u64 *);
int boot_kstrtoul(const char *, unsigned int, unsigned long *);
static unsigned long kaslr_get_random_long(const char *purpose) { return 0; }
static int count_immovable_mem_regions(void) { return 0; }
"""

_BOOT_END = """
void say(const char *, u64, u64);
int oracle_options(void)
{
    mem_limit = MAXMEM;
    handle_mem_options();
    for (int i = MEM_AVOID_MEMMAP_BEGIN; i <= MEM_AVOID_MEMMAP_END; i++)
        say("avoid", mem_avoid[i].start, mem_avoid[i].size);
    say("limit", mem_limit, memmap_too_large);
    say("pages", max_gb_huge_pages, cmdline_find_option_bool("nokaslr") != 0);
    return 0;
}
int oracle_slots(u64 minimum, u64 image)
{
    unsigned long output = minimum, address = 0;
    choose_random_location(4096, 4096, &output, image, &address);
    for (unsigned i = 0; i < slot_area_index; i++)
        say("slot", slot_areas[i].addr, slot_areas[i].num);
    return 0;
}
void oracle_entry(u64 addr, u64 size, u32 type)
{
    the_boot_params.e820_table[the_boot_params.e820_entries++] =
        (struct boot_e820_entry){ addr, size, type };
}
void oracle_line(char *line)
{
    the_boot_params.hdr.cmd_line_ptr = (u32)(unsigned long)line;
    the_boot_params.ext_cmd_line_ptr = (unsigned long)line >> 32;
}
"""

_KERNEL = """
#define MAX_NUMNODES 64
#define E820_MAX_ENTRIES_ZEROPAGE 128
#define KERN_DEBUG
#define printk(...)
#define pr_cont(...)
#define pr_warn(...)
#define pr_err(...)
#define pr_info(...)
#define pr_debug(...)
#define e820_print_type(x)
#define e820__print_table(x)
#define early_panic(x) oracle_stop("panic")
#define panic(x) oracle_stop("panic")
#define BUG_ON(x) do { if (x) oracle_stop("bug"); } while (0)
#define COUNT_(a, b, c, d, n, ...) n
#define COUNT_ARGS(x...) COUNT_(, ##x, 3, 2, 1, 0)
#define CONCATENATE_(a, b) a##b
#define CONCATENATE(a, b) CONCATENATE_(a, b)
#define irqs_disabled() 0
#define kernel_param_lock(x)
#define kernel_param_unlock(x)
#define param_check_unsafe(x) 1
#define KERNEL_PARAM_OPS_FL_NOARG 1
#define ERR_PTR(x) ((void *)(long)(x))
void oracle_stop(const char *);
void sort(void *, size_t, size_t, int (*)(const void *, const void *), void *);
struct kernel_param;
struct kernel_param_ops { u32 flags; int (*set)(const char *, const struct kernel_param *); };
struct kernel_param { const char *name; void *mod; struct kernel_param_ops *ops; short level; };
typedef int (*parse_unknown_fn)(char *, char *, const char *, void *);
struct obs_kernel_param { const char *str; int (*setup_func)(char *); int early; };
static struct obs_kernel_param __setup_start[2], *const __setup_end = __setup_start + 2;
char *skip_spaces(const char *text);
static u64 div_u64(u64 number, u32 by) { return number / by; }
"""

_KERNEL_END = """
void say(const char *, u64, u64);
static struct e820_table the_table;
void oracle_entry(u64 addr, u64 size, u32 type)
{
    e820_table = &the_table;
    __e820__range_add(e820_table, addr, size, type);
}
static char *the_line;
void oracle_line(char *line) { the_line = line; }
int oracle_options(void)
{
    static char text[2048];
    e820_table = &the_table;
    __setup_start[0] = (struct obs_kernel_param){ "memmap", parse_memmap_opt, 1 };
    __setup_start[1] = (struct obs_kernel_param){ "mem", parse_memopt, 1 };
    size_t length = strnlen(the_line, sizeof(text) - 1);
    memcpy(text, the_line, length);
    e820__update_table(e820_table);
    parse_args("early options", text, NULL, 0, 0, 0, NULL, do_early_param);
    e820__finish_early_params();
    for (u32 i = 0; i < e820_table->nr_entries; i++) {
        say("entry", e820_table->entries[i].addr, e820_table->entries[i].size);
        say("type", e820_table->entries[i].type, 0);
    }
    return 0;
}
int oracle_slots(u64 minimum, u64 image) { return 0; }
"""

_MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
typedef unsigned long long u64;
int oracle_options(void);
int oracle_slots(u64, u64);
void oracle_entry(u64, u64, unsigned);
void oracle_line(char *);
void say(const char *what, u64 a, u64 b) { printf("%s %llu %llu ", what, a, b); }
void oracle_stop(const char *why) { printf("%s 0 0 ", why); fflush(stdout); _exit(0); }
void sort(void *base, size_t n, size_t size, int (*compare)(const void *, const void *), void *swap)
{
    qsort(base, n, size, compare);
}
static void in_child(int (*work)(u64, u64), u64 minimum, u64 image)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (work) work(minimum, image); else oracle_options();
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (status) printf("killed %d 0 ", status);
}
int main(void)
{
    static char line[1 << 20];
    while (fgets(line, sizeof line, stdin)) {
        char *at = line;
        size_t length = strcspn(at, " ") / 2;
        char *text = calloc(length + 1, 1);
        for (size_t i = 0; i < length; i++, at += 2) {
            unsigned byte;
            sscanf(at, "%2x", &byte);
            text[i] = byte;
        }
        u64 minimum = strtoull(at, &at, 10), image = strtoull(at, &at, 10);
        u64 entries = strtoull(at, &at, 10);
        fflush(stdout);
        pid_t child = fork();  /* for the entries */
        if (child == 0) {
            while (entries--) {
                u64 addr = strtoull(at, &at, 10), size = strtoull(at, &at, 10);
                oracle_entry(addr, size, strtoull(at, &at, 10));
            }
            oracle_line(text);
            in_child(NULL, 0, 0);
            in_child(oracle_slots, minimum, image);
            fflush(stdout);
            _exit(0);
        }
        waitpid(child, NULL, 0);
        free(text);
        puts("");
        fflush(stdout);
    }
    return 0;
}
"""

#: The decompressor's own functions must not take the C library's place in the program.
_RENAMED = (
    "memcmp bcmp strcmp strncmp strchr strstr strlen strnlen simple_strtoull simple_strtol"
).split()


class Said(NamedTuple):
    """One thing that a program says: what, and two numbers."""

    what: str
    first: int
    second: int


class Oracle:
    """One of the two programs, running; leave the context to end it."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def ask(
        self,
        command_line: str,
        memory: list[tuple[int, int, int]],
        *,
        image: int = ALIGN,
        minimum: int = MINIMUM,
    ) -> list[Said]:
        """Ask what becomes of memory (start, size, type of each range) with a command line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        numbers = [minimum, image, len(memory), *(n for entry in memory for n in entry)]
        line = command_line.encode("utf-8", "surrogateescape").hex()
        print(line, *numbers, file=self._process.stdin, flush=True)
        words = self._process.stdout.readline().split()
        return [
            Said(words[at], int(words[at + 1]), int(words[at + 2]))
            for at in range(0, len(words), 3)
        ]


def build_decompressor(sources: Sources, directory: Path) -> Path:
    """Compile kaslr.c, and what it uses, into a program in a directory."""
    string = sources.text("arch/x86/boot/string.c")
    inserted = {
        "../../../../lib/ctype.c": _without_includes(sources.text("lib/ctype.c")),
        "../../../../lib/cmdline.c": _without_includes(sources.text("lib/cmdline.c")),
    }
    command_line = _with_includes(
        sources.text("arch/x86/boot/compressed/cmdline.c"),
        {"../cmdline.c": _without_includes(sources.text("arch/x86/boot/cmdline.c"))},
    )
    kaslr = _with_includes(sources.text("arch/x86/boot/compressed/kaslr.c"), inserted)
    parts = {
        "string.c": "\n".join(
            [_TYPES, _BOOT_STRING, sources.text("arch/x86/boot/ctype.h"), _without_includes(string)]
        ),
        "kaslr.c": "\n".join(
            [_TYPES, _BOOT, _without_includes(sources.text("include/linux/ctype.h")),
             command_line, kaslr, _BOOT_END]
        ),
    }  # fmt: skip
    return _compile(directory / "decompressor", parts, _RENAMED)


def build_kernel(sources: Sources, directory: Path) -> Path:
    """Compile the functions of e820.c, and those that read the command line, into a program."""
    e820 = sources.text("arch/x86/kernel/e820.c")
    params = sources.text("kernel/params.c")
    kstrtox = sources.text("lib/kstrtox.c")
    update = _function(e820, "e820__update_table")
    tables = e820[e820.index("struct change_member {") : e820.index(update)]
    integers = ["_parse_integer_fixup_radix", "_parse_integer_limit"]
    if "_parse_integer(" in re.sub("^#.*", "", sources.text("lib/kstrtox.h"), flags=re.MULTILINE):
        integers.append("_parse_integer")
    code = [
        _TYPES, _KERNEL,
        _without_includes(sources.text("include/linux/ctype.h")),
        _without_includes(sources.text("lib/ctype.c")),
        "char *skip_spaces(const char *t) { while (isspace(*t)) t++; return (char *)t; }",
        _without_includes(sources.text("lib/kstrtox.h")),
        *(_function(kstrtox, name) for name in integers),
        *(_function(sources.text("lib/vsprintf.c"), n)
          for n in ("simple_strntoull", "simple_strtoull")),
        "long simple_strtol(const char *t, char **e, unsigned int b) { __builtin_trap(); }",
        _without_includes(sources.text("lib/cmdline.c")),
        *(_function(params, n) for n in ("dash2underscore", "parameqn", "parameq", "parse_one",
                                         "parse_args")),
        _function(sources.text("init/main.c"), "do_early_param"),
        _without_includes(sources.text("arch/x86/include/asm/e820/types.h")),
        "static struct e820_table *e820_table;",
        *(_function(e820, n) for n in ("__e820__range_add", "e820__range_add")),
        tables, update,
        *(_function(e820, n) for n in ("__e820__range_update", "e820__range_update",
                                       "e820__range_remove")),
        "static int userdef;",
        *(_function(e820, n) for n in ("parse_memopt", "parse_memmap_one", "parse_memmap_opt",
                                       "e820__finish_early_params")),
        _KERNEL_END,
    ]  # fmt: skip
    return _compile(directory / "kernel", {"e820.c": "\n".join(code)}, ())


def _compile(directory: Path, parts: dict[str, str], renamed: tuple[str, ...] | list[str]) -> Path:
    directory.mkdir(parents=True)
    (directory / "main.c").write_text(_MAIN)
    flags = ["-O1", "-w", "-std=gnu11", "-fno-strict-aliasing", "-ffreestanding"]
    objects = []
    for name, text in parts.items():
        (directory / name).write_text(text)
        names = [f"-D{one}=kernel_{one}" for one in renamed]
        _run("cc", *flags, *names, "-c", name, "-o", f"{name}.o", cwd=directory)
        objects.append(f"{name}.o")
    _run("cc", "-O1", "main.c", *objects, "-o", "oracle", cwd=directory)
    return directory / "oracle"


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _without_includes(text: str) -> str:
    return _with_includes(text, {})


def _with_includes(text: str, inserted: dict[str, str]) -> str:
    """Replace each #include by the text of that name, or by nothing."""
    return _INCLUDE.sub(lambda found: inserted.get(found[1], ""), text)


def _function(text: str, name: str) -> str:
    """Return the definition of a function, from its type to its last brace."""
    for found in re.finditer(rf"^(?=\w)[^\n;{{}}]*\b{name}\(", text, re.MULTILINE):
        brace, semicolon = text.find("{", found.end()), text.find(";", found.end())
        if not 0 <= brace < (semicolon if semicolon >= 0 else len(text)):
            continue
        start = found.start()
        before = text[:start].rstrip("\n").rpartition("\n")[2]
        if re.match(r"(static|unsigned|const|char|int|noinline|__init|u64)\b", before):
            start = text.rfind(before, 0, start)
        return text[start : text.index("\n}", brace) + 3]
    raise AssertionError(f"{name}: not in the kernel's source")
