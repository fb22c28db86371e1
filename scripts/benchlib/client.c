/*
 * The measuring client of scripts/bench: one process, one tight loop of system calls per
 * verb, timed inside the process; a verb prints one JSON object on stdout.
 *
 * What belongs here: the loops, and nothing that decides what is measured or how it is judged.
 * A failing call ends the program with status 1 and one line on stderr.
 *
 *     client create|unlink|mkdir|rmdir DIR COUNT START      PREFIX is f for files, d for directories
 *     client rename DIR COUNT START FROM TO                 FROM and TO are one-letter prefixes
 *     client stat   DIR COUNT START RANGE REPEAT SEED       COUNT names out of RANGE, shuffled by SEED
 *     client list   DIR REPEAT                              readdir and a stat of every entry
 *     client write  FILE SIZE BLOCK FLAGS                   FLAGS: n new, d direct, - neither
 *     client read   FILE SIZE BLOCK FLAGS
 *     client pread  FILE SIZE BLOCK COUNT                   direct, at random offsets
 *     client touch  FILE SIZE                               MAP_SHARED: first, second touch, msync
 *     client turns  FILE NATIVE NATIVE SIZE WORK PASSES     map each, work on each in turns; WORK is first
 *                                                           (touch, after a punch), touch, random or copy
 *     client truncate FILE SIZE
 *     client reuse  OLD NEW SIZE                            unlink OLD, then give NEW its space
 *     client memset FILE|- SIZE THREADS PASSES              - is anonymous memory in huge pages
 *     client open   FILE COUNT                              open and close
 *     client fstat  FILE COUNT                              of one descriptor
 *     client latency FILE                                   forced getattr until stdin closes
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NAME_BYTES 16
#define HUGE_PAGE (2ul << 20)
#define LATENCIES (1 << 20)
#define RANDOM_OPS (1 << 20)
#define MOST_PASSES 64
#ifndef SYS_cachestat
#define SYS_cachestat 451 /* Linux 6.5; the numbers of new system calls are the same everywhere */
#endif

static void fail(const char *what, const char *which)
{
    fprintf(stderr, "client: %s %s: %s\n", what, which, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cpu_began;

/* The clock of a loop: wall time, and what this process has computed. */
static double start_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    cpu_began = (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
    return now();
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9 - cpu_began;
}

static uint64_t random_state = 88172645463325252ull;

static uint64_t random_u64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void report_ops(double ops, double seconds)
{
    printf("{\"ops\": %.0f, \"seconds\": %.9f, \"cpu_seconds\": %.9f, \"rate\": %.3f}\n", ops, seconds,
           cpu_seconds(), ops / seconds);
}

static void report_bytes(double bytes, double seconds)
{
    printf("{\"bytes\": %.0f, \"seconds\": %.9f, \"cpu_seconds\": %.9f, \"gb_per_s\": %.4f}\n", bytes,
           seconds, cpu_seconds(), bytes / seconds / 1e9);
}

/* Names are made before the clock starts, so that a loop holds system calls only. */
static char (*make_names(char prefix, uint64_t count, uint64_t start))[NAME_BYTES]
{
    char(*names)[NAME_BYTES] = malloc(count * NAME_BYTES);
    if (!names)
        fail("malloc", "names");
    for (uint64_t i = 0; i < count; i++)
        snprintf(names[i], NAME_BYTES, "%c%08llu", prefix, (unsigned long long)(start + i));
    return names;
}

static void enter(const char *dir)
{
    if (chdir(dir))
        fail("chdir", dir);
}

static int one_name_op(const char *verb, const char *name)
{
    if (!strcmp(verb, "create")) {
        int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
        return fd < 0 ? -1 : close(fd);
    }
    if (!strcmp(verb, "unlink"))
        return unlink(name);
    if (!strcmp(verb, "mkdir"))
        return mkdir(name, 0755);
    return rmdir(name);
}

static void names_verb(const char *verb, const char *dir, uint64_t count, uint64_t start)
{
    char prefix = strstr(verb, "dir") ? 'd' : 'f';
    char(*names)[NAME_BYTES] = make_names(prefix, count, start);
    enter(dir);
    double began = start_clock();
    for (uint64_t i = 0; i < count; i++)
        if (one_name_op(verb, names[i]))
            fail(verb, names[i]);
    report_ops((double)count, now() - began);
}

static void rename_verb(const char *dir, uint64_t count, uint64_t start, char from, char to)
{
    char(*old)[NAME_BYTES] = make_names(from, count, start);
    char(*new)[NAME_BYTES] = make_names(to, count, start);
    enter(dir);
    double began = start_clock();
    for (uint64_t i = 0; i < count; i++)
        if (rename(old[i], new[i]))
            fail("rename", old[i]);
    report_ops((double)count, now() - began);
}

static void stat_verb(const char *dir, uint64_t count, uint64_t start, uint64_t range,
                      uint64_t repeat, uint64_t seed)
{
    char(*names)[NAME_BYTES] = make_names('f', range, start);
    random_state += seed;
    for (uint64_t i = 0; i < count; i++) { /* the first COUNT places of a Fisher-Yates shuffle */
        uint64_t j = i + random_u64() % (range - i);
        char spare[NAME_BYTES];
        memcpy(spare, names[i], NAME_BYTES);
        memcpy(names[i], names[j], NAME_BYTES);
        memcpy(names[j], spare, NAME_BYTES);
    }
    enter(dir);
    struct stat st;
    double began = start_clock();
    for (uint64_t r = 0; r < repeat; r++)
        for (uint64_t i = 0; i < count; i++)
            if (stat(names[i], &st))
                fail("stat", names[i]);
    report_ops((double)(count * repeat), now() - began);
}

static void list_verb(const char *dir, uint64_t repeat)
{
    uint64_t entries = 0;
    double began = start_clock();
    for (uint64_t r = 0; r < repeat; r++) {
        DIR *d = opendir(dir);
        struct dirent *e;
        struct stat st;
        if (!d)
            fail("opendir", dir);
        while ((e = readdir(d)) != NULL) {
            if (fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW))
                fail("fstatat", e->d_name);
            entries++;
        }
        closedir(d);
    }
    report_ops((double)entries, now() - began);
}

static char *huge_buffer(uint64_t size)
{
    char *p = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        fail("mmap", "anonymous memory");
    p = (char *)(((uintptr_t)p + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    madvise(p, size, MADV_HUGEPAGE);
    memset(p, 0x5a, size);
    return p;
}

static int open_file(const char *path, int access, const char *flags)
{
    if (strchr(flags, 'd'))
        access |= O_DIRECT;
    if (strchr(flags, 'n'))
        access |= O_CREAT | O_EXCL;
    int fd = open(path, access, 0644);
    if (fd < 0)
        fail("open", path);
    return fd;
}

static void transfer_verb(int writing, const char *path, uint64_t size, uint64_t block,
                          const char *flags)
{
    char *buffer = huge_buffer(block);
    int fd = open_file(path, writing ? O_WRONLY : O_RDONLY, flags);
    double began = start_clock();
    for (uint64_t at = 0; at < size; at += block) {
        ssize_t n = writing ? write(fd, buffer, block) : read(fd, buffer, block);
        if (n != (ssize_t)block) {
            errno = n < 0 ? errno : EIO;
            fail(writing ? "write" : "read", path);
        }
    }
    double seconds = now() - began;
    close(fd);
    report_bytes((double)size, seconds);
}

static void pread_verb(const char *path, uint64_t size, uint64_t block, uint64_t count)
{
    char *buffer = huge_buffer(block);
    int fd = open_file(path, O_RDONLY, "d");
    double began = start_clock();
    for (uint64_t i = 0; i < count; i++)
        if (pread(fd, buffer, block, (off_t)(random_u64() % (size / block) * block)) != (ssize_t)block)
            fail("pread", path);
    double seconds = now() - began;
    close(fd);
    report_ops((double)count, seconds);
}

static double touch_once(char *p, uint64_t size, int value)
{
    double began = now();
    memset(p, value, size);
    return (double)size / (now() - began) / 1e9;
}

static void touch_verb(const char *path, uint64_t size)
{
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0 || ftruncate(fd, (off_t)size))
        fail("open or ftruncate", path);
    char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        fail("mmap", path);
    double first = touch_once(p, size, 1), second = touch_once(p, size, 2);
    double began = now();
    if (msync(p, size, MS_SYNC))
        fail("msync", path);
    double msync_s = now() - began, again = touch_once(p, size, 3);
    munmap(p, size);
    close(fd);
    printf("{\"first\": %.4f, \"second\": %.4f, \"msync_s\": %.6f, \"after_msync\": %.4f}\n", first,
           second, msync_s, again);
}

/* Ask for 2 MiB alignment, or huge pages cannot be mapped as such. */
static char *map_aligned(const char *path, int fd, uint64_t size)
{
    char *hint = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    hint = (char *)(((uintptr_t)hint + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    char *p = mmap(hint, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (p == MAP_FAILED)
        fail("mmap", path);
    return p;
}

/* How many pages of a file the page cache has; -1: this kernel does not say. */
static long cached_pages(int fd)
{
    struct {
        uint64_t offset, length;
    } all = {0, 0};
    uint64_t found[5]; /* in the cache, dirty, under writeback, evicted, recently evicted */
    return syscall(SYS_cachestat, fd, &all, found, 0) ? -1 : (long)found[0];
}

struct side {
    int fd;
    char *p;
    double seconds[MOST_PASSES];
};

static void random_accesses(char *p, uint64_t size)
{
    volatile uint64_t *words = (volatile uint64_t *)p;
    uint64_t mask = size / 8 - 1; /* of a power of two */
    for (int i = 0; i < RANDOM_OPS; i++) {
        uint64_t r = random_u64();
        words[r & mask] = words[(r >> 32) & mask] + 1;
    }
}

/*
 * One pass over one mapping; what it does depends on the pass alone, not on the mapping. It sleeps
 * for nothing, so CPU time is its time, but for the turns of other programs.
 */
static double work_once(const char *work, char *p, uint64_t size, int pass)
{
    uint64_t half = size / 2;
    random_state = 88172645463325252ull + (uint64_t)pass;
    start_clock();
    if (!strcmp(work, "random"))
        random_accesses(p, size);
    else if (!strcmp(work, "copy"))
        memcpy(pass % 2 ? p : p + half, pass % 2 ? p + half : p, half);
    else
        memset(p, pass, size);
    return cpu_seconds();
}

static void turns_verb(char **paths, uint64_t size, const char *work, int passes)
{
    struct side sides[3];
    int first = !strcmp(work, "first");
    if (passes < 1 || passes > MOST_PASSES || size & (size - 1)) {
        errno = EINVAL;
        fail("turns", work);
    }
    for (int i = 0; i < 3; i++) {
        sides[i].fd = open(paths[i], O_RDWR);
        if (sides[i].fd < 0)
            fail("open", paths[i]);
        sides[i].p = map_aligned(paths[i], sides[i].fd, size);
        if (!first)
            memset(sides[i].p, 1, size);
    }
    for (int pass = 0; pass < passes; pass++) {
        for (int turn = 0; turn < 3; turn++) {
            struct side *s = &sides[(pass + (pass / 3 % 2 ? 3 - turn : turn)) % 3];
            if (first && fallocate(sides[1].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size))
                fail("fallocate", paths[1]);
            s->seconds[pass] = work_once(work, s->p, size, pass);
        }
    }
    printf("{\"cached_pages\": %ld, \"seconds\": [", cached_pages(sides[0].fd));
    for (int pass = 0; pass < passes; pass++)
        printf("%s[%.9f, %.9f, %.9f]", pass ? ", " : "", sides[0].seconds[pass],
               sides[1].seconds[pass], sides[2].seconds[pass]);
    printf("]}\n");
}

static void truncate_verb(const char *path, uint64_t size)
{
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0)
        fail("open", path);
    double began = now();
    if (ftruncate(fd, (off_t)size))
        fail("ftruncate", path);
    printf("{\"seconds\": %.9f}\n", now() - began);
    close(fd);
}

/* The space of an unlinked file comes back when its last reference has gone, a moment later. */
static void reuse_verb(const char *old, const char *new, uint64_t size)
{
    int fd = open(new, O_RDWR | O_CREAT | O_EXCL, 0644);
    if (fd < 0)
        fail("open", new);
    double began = start_clock();
    if (unlink(old))
        fail("unlink", old);
    while (ftruncate(fd, (off_t)size)) {
        if (errno != ENOSPC || now() - began > 30)
            fail("ftruncate", new);
        usleep(200);
    }
    report_bytes((double)size, now() - began);
    close(fd);
}

struct slice {
    char *start;
    uint64_t size;
};

static void *memset_slice(void *arg)
{
    struct slice *s = arg;
    memset(s->start, 0, s->size);
    return NULL;
}

static double memset_threads(char *p, uint64_t size, int threads)
{
    pthread_t ids[64];
    struct slice slices[64];
    double began = now();
    for (int i = 0; i < threads; i++) {
        slices[i] = (struct slice){p + size / threads * i, size / threads};
        if (pthread_create(&ids[i], NULL, memset_slice, &slices[i]))
            fail("pthread_create", "memset");
    }
    for (int i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    return (double)size / (now() - began) / 1e9;
}

static void memset_verb(const char *path, uint64_t size, int threads, int passes)
{
    char *p;
    if (threads < 1 || threads > 64) {
        errno = EINVAL;
        fail("memset", "threads");
    }
    if (!strcmp(path, "-")) {
        p = huge_buffer(size);
    } else {
        int fd = open(path, O_RDWR | O_CREAT, 0600);
        if (fd < 0 || ftruncate(fd, (off_t)size))
            fail("open or ftruncate", path);
        p = map_aligned(path, fd, size);
        memset(p, 1, size);
    }
    printf("{\"passes\": [");
    for (int i = 0; i < passes; i++)
        printf("%s%.4f", i ? ", " : "", memset_threads(p, size, threads));
    printf("]}\n");
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void latency_verb(const char *path)
{
    double *us = malloc(LATENCIES * sizeof(double));
    struct pollfd input = {.fd = 0, .events = POLLIN};
    struct statx sx;
    int n = 0;
    if (!us)
        fail("malloc", "latencies");
    printf("{\"ready\": true}\n");
    fflush(stdout);
    while (n < LATENCIES && !poll(&input, 1, 0)) {
        double began = now();
        if (statx(AT_FDCWD, path, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &sx))
            fail("statx", path);
        us[n++] = (now() - began) * 1e6;
        usleep(200);
    }
    if (!n)
        exit(1);
    qsort(us, n, sizeof(double), by_value);
    printf("{\"samples\": %d, \"median_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f}\n", n, us[n / 2],
           us[n - 1 - n / 100], us[n - 1]);
}

static void open_verb(const char *path, uint64_t count)
{
    double began = start_clock();
    for (uint64_t i = 0; i < count; i++) {
        int fd = open(path, O_RDONLY);
        if (fd < 0 || close(fd))
            fail("open", path);
    }
    report_ops(count, now() - began);
}

static void fstat_verb(const char *path, uint64_t count)
{
    struct stat st;
    int fd = open(path, O_RDONLY);
    double began = start_clock();
    for (uint64_t i = 0; i < count; i++)
        if (fstat(fd, &st))
            fail("fstat", path);
    report_ops(count, now() - began);
}

static uint64_t number(char **argv, int at)
{
    return argv[at] ? strtoull(argv[at], NULL, 10) : 0;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *verb;
        int arguments;
    } verbs[] = {{"create", 3}, {"unlink", 3}, {"mkdir", 3},    {"rmdir", 3}, {"rename", 5},
                 {"stat", 6},   {"list", 2},   {"write", 4},    {"read", 4},  {"pread", 4},
                 {"touch", 2},  {"reuse", 3},  {"truncate", 2}, {"memset", 4}, {"open", 2},
                 {"fstat", 2},  {"latency", 1},
                 {"turns", 6}};
    int found = -1;
    for (unsigned i = 0; argc > 1 && i < sizeof verbs / sizeof *verbs; i++)
        if (!strcmp(argv[1], verbs[i].verb) && argc == verbs[i].arguments + 2)
            found = (int)i;
    if (found < 0) {
        fprintf(stderr, "client: usage: see the head of client.c\n");
        return 2;
    }
    const char *verb = argv[1], *path = argv[2];
    umask(022);
    if (found < 4)
        names_verb(verb, path, number(argv, 3), number(argv, 4));
    else if (!strcmp(verb, "rename"))
        rename_verb(path, number(argv, 3), number(argv, 4), argv[5][0], argv[6][0]);
    else if (!strcmp(verb, "stat"))
        stat_verb(path, number(argv, 3), number(argv, 4), number(argv, 5), number(argv, 6),
                  number(argv, 7));
    else if (!strcmp(verb, "list"))
        list_verb(path, number(argv, 3));
    else if (!strcmp(verb, "write") || !strcmp(verb, "read"))
        transfer_verb(verb[0] == 'w', path, number(argv, 3), number(argv, 4), argv[5]);
    else if (!strcmp(verb, "pread"))
        pread_verb(path, number(argv, 3), number(argv, 4), number(argv, 5));
    else if (!strcmp(verb, "touch"))
        touch_verb(path, number(argv, 3));
    else if (!strcmp(verb, "turns"))
        turns_verb(argv + 2, number(argv, 5), argv[6], (int)number(argv, 7));
    else if (!strcmp(verb, "truncate"))
        truncate_verb(path, number(argv, 3));
    else if (!strcmp(verb, "reuse"))
        reuse_verb(path, argv[3], number(argv, 4));
    else if (!strcmp(verb, "memset"))
        memset_verb(path, number(argv, 3), (int)number(argv, 4), (int)number(argv, 5));
    else if (!strcmp(verb, "open"))
        open_verb(path, number(argv, 3));
    else if (!strcmp(verb, "fstat"))
        fstat_verb(path, number(argv, 3));
    else
        latency_verb(path);
    return 0;
}
