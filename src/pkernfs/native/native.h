/*
 * What each file of this directory offers to Python, and to the others.
 *
 * build.py gives the part between the two marks to cffi: there are declarations only, and an
 * #define there is a constant whose value the compiler tells.  Numbers that Python declares
 * (pages, the format of entries, registers) come from _declared.h, which build.py makes.
 *
 * Threads: cffi lets the interpreter go during each call.  A function with arguments only may run
 * in any thread, as long as the caller keeps others from the memory that it stores to.  Files with
 * statics say who may use them.
 */
#ifndef PKERNFS_NATIVE_H
#define PKERNFS_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_declared.h"

/* cdef */

/* ---------------------------------------------------------------- store.c */

void pk_trace_start(void);
uint64_t pk_trace_stop(void);
const uint8_t *pk_trace_data(void);

int pk_copy(uint8_t *base, uint64_t offset, const uint8_t *data, uint64_t n);
int pk_copy_out(const uint8_t *base, uint64_t offset, uint8_t *data, uint64_t n);
int pk_zero(uint8_t *base, uint64_t offset, uint64_t n);
void pk_store_u64(uint8_t *base, uint64_t offset, uint64_t value);
int pk_is_zero(const uint8_t *p, uint64_t n);

/* ---------------------------------------------------------------- crc.c, crc64.c, digest.c */

uint32_t pk_crc32c(uint32_t crc, const uint8_t *p, uint64_t n);
uint32_t pk_page_crc(const uint8_t *page);
uint64_t pk_crc64(uint64_t crc, const uint8_t *p, uint64_t n);
uint64_t pk_digest(const uint8_t *base, uint64_t size, const uint64_t *parts,
		   const uint64_t *ends, uint64_t n, uint64_t *digests, int *gone);
void pk_page_sums(const uint8_t *base, const uint64_t *numbers, uint64_t n, int slots,
		  uint32_t *sums);

/* ---------------------------------------------------------------- journal.c */

enum pk_commit_error { COMMIT_TOO_LARGE = -1, COMMIT_NO_MEMORY = -2, COMMIT_OUTSIDE = -3 };
enum pk_journal_state { JOURNAL_DAMAGED = -1, JOURNAL_EMPTY, JOURNAL_PENDING };

int64_t pk_commit(uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		  uint64_t sequence, const uint8_t *uuid, uint8_t *images, const uint64_t *numbers,
		  const uint8_t *fresh, uint64_t n);
int64_t pk_commit_words(uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
			uint64_t sequence, const uint8_t *uuid, const uint64_t *offsets,
			const uint64_t *words, uint64_t n);
int pk_journal_state(const uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		     const uint8_t *uuid);
int pk_journal_replay(uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		      const uint8_t *uuid);

/* ---------------------------------------------------------------- pagetable.c */

#define PT_NONE (~0ull)		/* instead of a physical address or an offset: there is none */
#define PT_BROKEN (~1ull)

/* Of a page in a pool: NEW and FREED are so until the change is committed; see page_pool.py. */
enum pk_page_state { PAGE_FREE, PAGE_REACHABLE, PAGE_NEW, PAGE_FREED, PAGE_DEFERRED };

/* The first of page_walk.Code. */
enum pk_found {
	FOUND_TABLE_OUTSIDE = 1, FOUND_TABLE_TWICE, FOUND_RESERVED_BITS, FOUND_LEAF_OUTSIDE,
	FOUND_LEAF_IS_TABLE
};

struct pk_piece { uint64_t physical, offset, length, first; };	/* first: number of its first page */

struct pk_pool {
	const struct pk_piece *pieces;	/* in order of physical address and of page number */
	uint64_t n_pieces;
	uint8_t *state;			/* of each page */
	uint64_t n_pages, cursor;
	uint64_t free, wanted, peak;	/* pages free at the start; taken since; the most of that */
};

struct pk_mapping { uint64_t iova, physical, length, bits; };

struct pk_finding { uint64_t code, level, iova, where, value; };

struct pk_check {
	uint64_t table_reserved[PT_MAX_LEVEL + 1], leaf_reserved[PT_MAX_LEVEL + 1];
	const uint64_t *allowed, *tables;	/* start, end; start, end; ... sorted */
	uint64_t n_allowed, n_tables;
	struct pk_finding *found;
	uint64_t max_found, n_found, n_leaves, n_seen, bytes;
};

int pk_pt_is_reachable(const struct pk_pool *pool, uint64_t physical);
uint64_t pk_pt_alloc(struct pk_pool *pool);
void pk_pt_free(struct pk_pool *pool, uint64_t physical);
void pk_pt_fill(uint64_t *entries, uint64_t first, uint64_t step, uint64_t n);
uint64_t pk_pt_build(uint8_t *base, struct pk_pool *pool, unsigned level, unsigned leaf,
		     uint64_t physical, uint64_t bits);
uint64_t pk_pt_conflict(const uint64_t *entries, uint64_t first, uint64_t step, uint64_t n);
int pk_pt_any(const uint64_t *entries, uint64_t n);
uint64_t pk_pt_merged(const uint64_t *entries, uint64_t step);
uint64_t pk_pt_verify(const uint8_t *base, const struct pk_pool *pool, uint64_t table,
		      unsigned level, uint64_t physical, uint64_t bits);
uint64_t pk_pt_drop(const uint8_t *base, struct pk_pool *pool, uint64_t table, unsigned level);
uint64_t pk_pt_copy(uint8_t *base, struct pk_pool *pool, uint64_t table, unsigned level,
		    uint64_t bits, uint64_t *bytes);
int64_t pk_pt_scan(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
		   uint64_t *from, uint64_t to, struct pk_mapping *out, uint64_t max);
void pk_pt_check(const uint8_t *base, struct pk_pool *pool, struct pk_check *c, uint64_t root,
		 unsigned levels);
int pk_pt_mark(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
	       const struct pk_pool *memory, uint8_t *blocks, uint8_t *seen);
uint64_t pk_pt_find(const uint8_t *base, const struct pk_pool *pool, uint64_t root,
		    unsigned levels, const uint64_t *ranges, uint64_t n, uint8_t *seen);

/* ---------------------------------------------------------------- mmio.c */

struct pk_step { uint64_t kind, offset, value, mask; };

/* Bytes that steps may reach. */
struct pk_reach {
	uint8_t *registers;
	uint64_t n_registers;
	const uint8_t *memory;
	uint64_t n_memory;
};

enum pk_run { RUN_IN_VAIN, RUN_DONE, RUN_OUTSIDE };

uint32_t pk_mmio_read32(const uint8_t *registers, uint64_t offset);
uint64_t pk_mmio_read64(const uint8_t *registers, uint64_t offset);
int pk_mmio_run(const struct pk_reach *reach, const struct pk_step *steps, uint64_t n,
		const struct pk_step *last, uint64_t n_last, uint64_t nanoseconds);
void pk_flush_lines(const uint8_t *p, uint64_t n);

/* ---------------------------------------------------------------- map.c */

uint8_t *pk_map(int fd, uint64_t offset, uint64_t size, uint64_t align, int writable, int *error);
void pk_unmap(uint8_t *map, uint64_t size);
void pk_release(uint8_t *map, uint64_t size);
int pk_is_resident(const uint8_t *map, uint64_t offset, uint64_t n);
void pk_exit_on_bus_error(const char *line, int status);
void pk_bus_error(void);
int pk_reserve(int fd, uint64_t offset, uint64_t n);
int pk_punch(int fd, uint64_t offset, uint64_t n);
int pk_msync(uint8_t *map, uint64_t size);
uint64_t pk_fs_magic(int fd);
int pk_syncfs(int fd);
int pk_untouched(int directory, uint64_t *bytes);

struct pk_existing { uint64_t offset, length, physical; };	/* bytes; physical: NO_ADDRESS: none */

#define NO_ADDRESS UINT64_MAX

int64_t pk_existing_runs(int fd, uint64_t start, uint64_t end, uint64_t page, struct pk_existing *out,
			 uint64_t max);

/* ---------------------------------------------------------------- notify.c */

/* A system call that a filter has stopped: struct seccomp_notif.  pid: of the thread, as we see it. */
struct pk_notified {
	uint64_t id;
	uint32_t pid, flags;
	int32_t number;
	uint32_t arch;
	uint64_t instruction, args[6];
};

/* Whose permissions count; capabilities: those that the caller has. */
struct pk_caller {
	uint32_t uid, gid;
	const uint32_t *groups;
	uint32_t n_groups;
	uint64_t capabilities;
};

struct pk_place { uint64_t mount, device, ino; };

int pk_no_new_privs(void);
void pk_let_trace(int pid);
int pk_seccomp_listen(const uint64_t *program, uint16_t n, int *waits);
void pk_notify_in_turn(int listener);
int pk_notify_receive(int listener, struct pk_notified *call);
int pk_notify_is_valid(int listener, uint64_t id);
int pk_notify_go_on(int listener, uint64_t id);
int pk_notify_done(int listener, uint64_t id);
int pk_notify_give(int listener, uint64_t id, int fd, uint32_t flags, int at_once);
int64_t pk_read_process(int pid, uint64_t address, uint8_t *out, uint32_t n);
int pk_open(const struct pk_caller *who, int directory, const char *path, uint64_t flags,
	    uint64_t resolve);
int pk_may_access(const struct pk_caller *who, int fd, int mode);
int pk_place_of(const char *path, struct pk_place *place);

/* end of cdef */

/* Of store.c: all stores into a region go through these, or are told to trace_stored(). */
void put_words(uint8_t *base, uint64_t offset, const void *data, uint64_t n);
void put_bytes(uint8_t *base, uint64_t offset, const void *data, uint64_t n);
void trace_stored(const uint8_t *base, uint64_t offset, uint64_t n);

/* Of map.c: where a bus error of this thread jumps to; NULL: it ends the process. */
extern __thread sigjmp_buf *bus_error_guard;

#endif
