/*
 * Everything that stores into a region, and the two loops over bytes that Python is too slow for.
 *
 * Every store goes through put_words(), put_bytes(), put_zeros() or put_u64(): the tests switch
 * pk_trace on and rebuild the region as it was between any two of them.  Offsets are region
 * offsets in bytes; the caller has checked them against the size of the region, except in
 * pk_replay(), whose input is read from the region and is trusted in nothing.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define HUGE_PAGE (2ul << 20)
/* Two runs of changed words with no more than this between them are one run. */
#define GAP 2

/* ---------------------------------------------------------------- trace */

struct trace_entry { uint64_t offset, length, kind; };	/* kind 0: data follows, 1: zeros */

static uint8_t *trace_buf;
static uint64_t trace_len, trace_cap;
static int tracing;

static void trace(uint64_t offset, const void *data, uint64_t length)
{
	uint64_t body = data ? (length + 7) & ~7ull : 0;
	struct trace_entry e = { offset, length, data ? 0 : 1 };

	if (trace_len + sizeof(e) + body > trace_cap) {
		uint64_t cap = (trace_len + sizeof(e) + body) * 2;
		uint8_t *grown = realloc(trace_buf, cap);

		if (!grown)
			abort();
		trace_buf = grown;
		trace_cap = cap;
	}
	memcpy(trace_buf + trace_len, &e, sizeof(e));
	if (data) {
		memset(trace_buf + trace_len + sizeof(e), 0, body);
		memcpy(trace_buf + trace_len + sizeof(e), data, length);
	}
	trace_len += sizeof(e) + body;
}

void pk_trace_start(void)
{
	trace_len = 0;
	tracing = 1;
}

uint64_t pk_trace_stop(void)
{
	tracing = 0;
	return trace_len;
}

const uint8_t *pk_trace_data(void)
{
	return trace_buf;
}

/* ---------------------------------------------------------------- stores */

static void put_words(uint8_t *base, uint64_t offset, const void *data, uint64_t n)
{
	volatile uint64_t *to = (volatile uint64_t *)(base + offset);
	const uint8_t *from = data;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t w;

		memcpy(&w, from + 8 * i, 8);
		to[i] = w;
	}
	if (tracing)
		trace(offset, data, 8 * n);
}

static void put_bytes(uint8_t *base, uint64_t offset, const void *data, uint64_t n)
{
	memcpy(base + offset, data, n);
	if (tracing)
		trace(offset, data, n);
}

static void put_zeros(uint8_t *base, uint64_t offset, uint64_t n)
{
	memset(base + offset, 0, n);
	if (tracing)
		trace(offset, NULL, n);
}

static void put_u64(uint8_t *base, uint64_t offset, uint64_t value)
{
	__atomic_store_n((uint64_t *)(base + offset), value, __ATOMIC_RELEASE);
	if (tracing)
		trace(offset, &value, 8);
}

void pk_copy(uint8_t *base, uint64_t offset, const uint8_t *data, uint64_t n)
{
	put_bytes(base, offset, data, n);
}

void pk_zero(uint8_t *base, uint64_t offset, uint64_t n)
{
	put_zeros(base, offset, n);
}

void pk_store_u64(uint8_t *base, uint64_t offset, uint64_t value)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	put_u64(base, offset, value);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

int pk_is_zero(const uint8_t *p, uint64_t n)
{
	if (!n)
		return 1;
	return p[0] == 0 && memcmp(p, p + 1, n - 1) == 0;
}

/* ---------------------------------------------------------------- crc32c */

static uint32_t crc_table[256];

__attribute__((constructor)) static void crc_init(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;

		for (int k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
		crc_table[i] = c;
	}
}

static uint32_t crc_soft(uint32_t c, const uint8_t *p, uint64_t n)
{
	while (n--)
		c = c >> 8 ^ crc_table[(c ^ *p++) & 0xff];
	return c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2")))
static uint32_t crc_hard(uint32_t crc, const uint8_t *p, uint64_t n)
{
	uint64_t c = crc;

	for (; n >= 8; n -= 8, p += 8) {
		uint64_t w;

		memcpy(&w, p, 8);
		c = __builtin_ia32_crc32di(c, w);
	}
	while (n--)
		c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
	return (uint32_t)c;
}
#endif

/* RFC 3720's CRC32C; pass 0 to start, a former result to go on. */
uint32_t pk_crc32c(uint32_t crc, const uint8_t *p, uint64_t n)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("sse4.2"))
		return ~crc_hard(~crc, p, n);
#endif
	return ~crc_soft(~crc, p, n);
}

/* The checksum of a metadata page: its own field (bytes 4 to 7) counts as zero. */
uint32_t pk_page_crc(const uint8_t *page)
{
	uint8_t head[8];

	memcpy(head, page, 4);
	memset(head + 4, 0, 4);
	return pk_crc32c(pk_crc32c(0, head, 8), page + 8, PAGE - 8);
}

/* ---------------------------------------------------------------- journal */

/* docs/format.md, "Journal".  The record starts the journal area; runs follow the header. */
struct record {
	uint64_t commit;	/* sequence number; 0: no record is pending */
	uint32_t magic;
	uint32_t checksum;	/* of the bytes from sequence on, header and runs */
	uint64_t sequence;
	uint64_t length;	/* of the runs, in bytes */
	uint64_t runs;
	uint8_t uuid[16];
	uint64_t reserved;
};
#define RECORD_MAGIC 0x524a4b50u	/* "PKJR" */
#define COVERED_FROM 16			/* offset of sequence: what checksum covers starts here */

struct run { uint64_t offset, words; };

static uint32_t record_crc(const uint8_t *journal, uint64_t length)
{
	return pk_crc32c(0, journal + COVERED_FROM, sizeof(struct record) - COVERED_FROM + length);
}

static void apply(uint8_t *base, const uint8_t *runs, uint64_t length)
{
	for (uint64_t at = 0; at < length;) {
		struct run r;

		memcpy(&r, runs + at, sizeof(r));
		put_words(base, r.offset, runs + at + sizeof(r), r.words);
		at += sizeof(r) + 8 * r.words;
	}
}

/* Append what differs between a page and its new image to the record; -1: the record is full. */
static int64_t diff_page(uint8_t *out, uint64_t used, uint64_t room, uint64_t offset,
			 const uint8_t *old, const uint8_t *new, uint64_t *runs)
{
	unsigned i = 0;

	while (i < WORDS) {
		unsigned end, last;
		struct run r;

		if (!memcmp(old + 8 * i, new + 8 * i, 8)) {
			i++;
			continue;
		}
		last = i;
		for (end = i + 1; end < WORDS && end - last <= GAP; end++)
			if (memcmp(old + 8 * end, new + 8 * end, 8))
				last = end;
		r.offset = offset + 8 * i;
		r.words = last + 1 - i;
		if (used + sizeof(r) + 8 * r.words > room)
			return -1;
		memcpy(out + used, &r, sizeof(r));
		memcpy(out + used + sizeof(r), new + 8 * i, 8 * r.words);
		used += sizeof(r) + 8 * r.words;
		++*runs;
		i = last + 1;
	}
	return (int64_t)used;
}

static void seal(uint8_t *page)
{
	uint32_t crc = pk_page_crc(page);

	memcpy(page + 4, &crc, 4);
}

/* A page that nothing reaches yet is stored in place, before the record that links it. */
static void put_fresh(uint8_t *base, uint64_t offset, const uint8_t *page)
{
	for (unsigned i = 0; i < WORDS;) {
		unsigned end = i;

		while (end < WORDS && memcmp(base + offset + 8 * end, page + 8 * end, 8))
			end++;
		if (end > i)
			put_words(base, offset + 8 * i, page + 8 * i, end - i);
		i = end + 1;
	}
}

static uint8_t *scratch;
static uint64_t scratch_size;

/*
 * Commit n page images as one: fresh ones in place, the changed words of the others through the
 * journal.  images holds n pages one after the other, numbers their page numbers, fresh one byte
 * each.  Returns the length of the record, -1 if the journal is too small for it, -2 without
 * memory; in both cases no page that is in use was touched.
 */
int64_t pk_commit(uint8_t *base, uint64_t journal, uint64_t capacity, uint64_t sequence,
		  const uint8_t *uuid, uint8_t *images, const uint64_t *numbers,
		  const uint8_t *fresh, uint64_t n)
{
	struct record head = { .magic = RECORD_MAGIC, .sequence = sequence };
	int64_t used = 0;

	if (scratch_size < capacity) {
		free(scratch);
		scratch = malloc(capacity);
		scratch_size = scratch ? capacity : 0;
		if (!scratch)
			return -2;
	}
	for (uint64_t i = 0; i < n; i++)
		seal(images + i * PAGE);
	for (uint64_t i = 0; i < n; i++) {
		if (fresh[i])
			continue;
		used = diff_page(scratch + sizeof(head), (uint64_t)used, capacity - sizeof(head),
				 numbers[i] * PAGE, base + numbers[i] * PAGE, images + i * PAGE,
				 &head.runs);
		if (used < 0)
			return -1;
	}
	for (uint64_t i = 0; i < n; i++)
		if (fresh[i])
			put_fresh(base, numbers[i] * PAGE, images + i * PAGE);
	if (!used)
		return 0;
	memcpy(head.uuid, uuid, 16);
	head.length = (uint64_t)used;
	memcpy(scratch, &head, sizeof(head));
	head.checksum = record_crc(scratch, head.length);
	memcpy(scratch, &head, sizeof(head));
	put_bytes(base, journal + 8, scratch + 8, sizeof(head) - 8 + head.length);
	pk_store_u64(base, journal, sequence);
	apply(base, scratch + sizeof(head), head.length);
	pk_store_u64(base, journal, 0);
	return used;
}

/*
 * What a journal holds: 0 nothing, 1 a whole record (its runs stay inside the region and outside
 * the journal), -1 a damaged one.
 */
int pk_journal_state(const uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		     const uint8_t *uuid)
{
	const uint8_t *runs = base + journal + sizeof(struct record);
	struct record head;
	uint64_t at = 0, count = 0;

	memcpy(&head, base + journal, sizeof(head));
	if (!head.commit)
		return 0;
	if (head.magic != RECORD_MAGIC || head.commit != head.sequence ||
	    memcmp(head.uuid, uuid, 16) || head.length > capacity - sizeof(head) ||
	    record_crc(base + journal, head.length) != head.checksum)
		return -1;
	while (at < head.length) {
		struct run r;
		uint64_t bytes;

		if (head.length - at < sizeof(r))
			return -1;
		memcpy(&r, runs + at, sizeof(r));
		if (!r.words || r.words > WORDS || r.words > (head.length - at - sizeof(r)) / 8)
			return -1;
		bytes = 8 * r.words;
		if (r.offset % 8 || r.offset > size || bytes > size - r.offset)
			return -1;
		if (r.offset < journal + capacity && r.offset + bytes > journal)
			return -1;
		at += sizeof(r) + bytes;
		count++;
	}
	return count == head.runs ? 1 : -1;
}

/* Carry out the record that pk_journal_state() found whole; any number of times is once. */
void pk_journal_replay(uint8_t *base, uint64_t journal)
{
	struct record head;

	memcpy(&head, base + journal, sizeof(head));
	apply(base, base + journal + sizeof(head), head.length);
	pk_store_u64(base, journal, 0);
}

void pk_journal_clear(uint8_t *base, uint64_t journal)
{
	pk_store_u64(base, journal, 0);
}

/* ---------------------------------------------------------------- mapping */

/*
 * Map size bytes of fd, aligned to align (a power of two, 2 MiB or more) so that huge pages are
 * used; fd -1 maps anonymous memory.  Returns NULL and the reason in *error.
 */
uint8_t *pk_map(int fd, uint64_t size, uint64_t align, int writable, int *error)
{
	int prot = PROT_READ | (writable ? PROT_WRITE : 0);
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
	uint8_t *room, *at, *map;
	uint64_t span;

	if (align < HUGE_PAGE)
		align = HUGE_PAGE;
	span = size + align;
	room = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED) {
		*error = errno;
		return NULL;
	}
	at = (uint8_t *)(((uintptr_t)room + align - 1) & ~(uintptr_t)(align - 1));
	map = mmap(at, size, prot, flags | MAP_FIXED, fd, 0);
	if (map == MAP_FAILED) {
		*error = errno;
		munmap(room, span);
		return NULL;
	}
	if (at > room)
		munmap(room, (size_t)(at - room));
	if (at + size < room + span)
		munmap(at + size, (size_t)(room + span - at - size));
	madvise(map, size, MADV_HUGEPAGE);	/* advice: hugetlbfs and devices refuse it */
	return map;
}

/*
 * End a mapping, but keep its addresses: a view that is still held faults instead of reaching
 * what is mapped there next.
 */
void pk_unmap(uint8_t *map, uint64_t size)
{
	mmap(map, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

int pk_msync(uint8_t *map, uint64_t size)
{
	return msync(map, size, MS_SYNC) ? errno : 0;
}

/* f_type of the file system that fd is on; 0 if it cannot be told. */
uint64_t pk_fs_magic(int fd)
{
	struct statfs s;

	return fstatfs(fd, &s) ? 0 : (uint64_t)s.f_type;
}
