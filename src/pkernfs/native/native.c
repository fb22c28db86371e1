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
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <time.h>
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

/* ---------------------------------------------------------------- crc64 */

/*
 * CRC-64/NVME: reflected, all ones in and out.  With carry-less multiplication lanes of 16 bytes
 * are folded a stride ahead each; what is left of them is a short message with the same CRC.
 */
#define CRC64_POLY 0x9a6c9329ac4bc9b5ull
#define LANES 8
#define STRIDE (16 * LANES)
#define WIDE_STRIDE (64 * LANES)
#define AHEAD 4096	/* bytes to fetch into the caches in time */

static uint64_t crc64_table[8][256];
static struct fold { uint64_t low, high; } fold_stride, fold_wide;

/* x^n modulo the polynomial, reflected. */
static uint64_t crc64_power(unsigned n)
{
	uint64_t v = 1ull << 63;

	while (n--)
		v = v >> 1 ^ (v & 1 ? CRC64_POLY : 0);
	return v;
}

__attribute__((constructor)) static void crc64_init(void)
{
	for (unsigned i = 0; i < 256; i++) {
		uint64_t c = i;

		for (int k = 0; k < 8; k++)
			c = c >> 1 ^ (c & 1 ? CRC64_POLY : 0);
		crc64_table[0][i] = c;
	}
	for (unsigned t = 1; t < 8; t++)
		for (unsigned i = 0; i < 256; i++) {
			uint64_t c = crc64_table[t - 1][i];

			crc64_table[t][i] = c >> 8 ^ crc64_table[0][c & 0xff];
		}
	fold_stride = (struct fold){ crc64_power(8 * STRIDE + 63), crc64_power(8 * STRIDE - 1) };
	fold_wide = (struct fold){ crc64_power(8 * WIDE_STRIDE + 63),
				   crc64_power(8 * WIDE_STRIDE - 1) };
}

static uint64_t crc64_soft(uint64_t c, const uint8_t *p, uint64_t n)
{
	for (; n >= 8; n -= 8, p += 8) {
		uint64_t w;

		memcpy(&w, p, 8);
		c ^= w;
		c = crc64_table[7][c & 0xff] ^ crc64_table[6][c >> 8 & 0xff] ^
		    crc64_table[5][c >> 16 & 0xff] ^ crc64_table[4][c >> 24 & 0xff] ^
		    crc64_table[3][c >> 32 & 0xff] ^ crc64_table[2][c >> 40 & 0xff] ^
		    crc64_table[1][c >> 48 & 0xff] ^ crc64_table[0][c >> 56];
	}
	while (n--)
		c = c >> 8 ^ crc64_table[0][(c ^ *p++) & 0xff];
	return c;
}

#if defined(__x86_64__)
typedef long long vec __attribute__((vector_size(16), aligned(1), may_alias));

__attribute__((target("pclmul,sse2")))
static uint64_t crc64_hard(uint64_t crc, const uint8_t *p, uint64_t n)
{
	const vec fold = { (long long)fold_stride.low, (long long)fold_stride.high };
	uint8_t rest[STRIDE];
	vec lane[LANES];

	if (n < 2 * STRIDE)
		return crc64_soft(crc, p, n);
	memcpy(lane, p, STRIDE);
	lane[0][0] ^= (long long)crc;
	for (p += STRIDE, n -= STRIDE; n >= STRIDE; p += STRIDE, n -= STRIDE) {
		__builtin_prefetch(p + AHEAD);
		__builtin_prefetch(p + AHEAD + 64);
		for (unsigned i = 0; i < LANES; i++)
			lane[i] = (vec)__builtin_ia32_pclmulqdq128(lane[i], fold, 0x00) ^
				  (vec)__builtin_ia32_pclmulqdq128(lane[i], fold, 0x11) ^
				  *(const vec *)(p + 16 * i);
	}
	memcpy(rest, lane, STRIDE);
	return crc64_soft(crc64_soft(0, rest, STRIDE), p, n);
}

/* The same with four lanes in a register. */
__attribute__((target("vpclmulqdq,avx512f")))
static uint64_t crc64_wide(uint64_t crc, const uint8_t *p, uint64_t n)
{
	const __m512i fold = _mm512_set4_epi64((long long)fold_wide.high, (long long)fold_wide.low,
					       (long long)fold_wide.high, (long long)fold_wide.low);
	uint8_t rest[WIDE_STRIDE];
	__m512i lane[LANES];

	if (n < 2 * WIDE_STRIDE)
		return crc64_hard(crc, p, n);
	memcpy(rest, p, WIDE_STRIDE);
	for (unsigned i = 0; i < 8; i++)
		rest[i] ^= (uint8_t)(crc >> 8 * i);
	for (unsigned i = 0; i < LANES; i++)
		lane[i] = _mm512_loadu_si512(rest + 64 * i);
	for (p += WIDE_STRIDE, n -= WIDE_STRIDE; n >= WIDE_STRIDE; p += WIDE_STRIDE, n -= WIDE_STRIDE)
		for (unsigned i = 0; i < LANES; i++) {
			__builtin_prefetch(p + AHEAD + 64 * i);
			lane[i] = _mm512_ternarylogic_epi64(
				_mm512_clmulepi64_epi128(lane[i], fold, 0x00),
				_mm512_clmulepi64_epi128(lane[i], fold, 0x11),
				_mm512_loadu_si512(p + 64 * i), 0x96);	/* exclusive or of three */
		}
	for (unsigned i = 0; i < LANES; i++)
		_mm512_storeu_si512(rest + 64 * i, lane[i]);
	return crc64_hard(crc64_hard(0, rest, WIDE_STRIDE), p, n);
}
#endif

/* Pass 0 to start, a former result to go on. */
uint64_t pk_crc64(uint64_t crc, const uint8_t *p, uint64_t n)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f"))
		return ~crc64_wide(~crc, p, n);
	if (__builtin_cpu_supports("pclmul"))
		return ~crc64_hard(~crc, p, n);
#endif
	return ~crc64_soft(~crc, p, n);
}

/*
 * CRC-64 of n chunks, each of several parts of a region.  parts holds {offset, length} pairs, an
 * offset of ~0 standing for that many zeros; chunk i ends before part ends[i].  Returns the number
 * of the first chunk that is not inside size bytes, n if all are.
 */
uint64_t pk_digest(const uint8_t *base, uint64_t size, const uint64_t *parts,
		   const uint64_t *ends, uint64_t n, uint64_t *digests)
{
	static const uint8_t zeros[16 * PAGE];
	uint64_t part = 0;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t crc = 0;

		for (; part < ends[i]; part++) {
			uint64_t offset = parts[2 * part], left = parts[2 * part + 1];

			if (offset != ~0ull) {
				if (offset > size || left > size - offset)
					return i;
				crc = pk_crc64(crc, base + offset, left);
				continue;
			}
			while (left) {
				uint64_t step = left < sizeof(zeros) ? left : sizeof(zeros);

				crc = pk_crc64(crc, zeros, step);
				left -= step;
			}
		}
		digests[i] = crc;
	}
	return n;
}

/*
 * Checksums of n metadata pages, or unless slots is 0 of the sixteen 256-byte slots of each.  Where a
 * page says another one in its header it is the complement.  The caller has checked the numbers.
 */
void pk_page_sums(const uint8_t *base, const uint64_t *numbers, uint64_t n, int slots,
		  uint32_t *sums)
{
	for (uint64_t i = 0; i < n; i++) {
		const uint8_t *page = base + numbers[i] * PAGE;

		if (!slots) {
			uint32_t crc = pk_page_crc(page), said;

			memcpy(&said, page + 4, 4);
			*sums++ = said == crc ? crc : ~crc;
		}
		for (unsigned s = 0; slots && s < 16; s++)
			*sums++ = pk_crc32c(0, page + s * (PAGE / 16), PAGE / 16);
	}
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

static int make_scratch(uint64_t capacity)
{
	if (scratch_size < capacity) {
		free(scratch);
		scratch = malloc(capacity);
		scratch_size = scratch ? capacity : 0;
	}
	return scratch != NULL;
}

/* Store the record whose runs are in scratch, then what it says, and let it go. */
static void carry_out(uint8_t *base, uint64_t journal, struct record *head, const uint8_t *uuid)
{
	memcpy(head->uuid, uuid, 16);
	memcpy(scratch, head, sizeof(*head));
	head->checksum = record_crc(scratch, head->length);
	memcpy(scratch, head, sizeof(*head));
	put_bytes(base, journal + 8, scratch + 8, sizeof(*head) - 8 + head->length);
	pk_store_u64(base, journal, head->sequence);
	apply(base, scratch + sizeof(*head), head->length);
	pk_store_u64(base, journal, 0);
}

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

	if (!make_scratch(capacity))
		return -2;
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
	head.length = (uint64_t)used;
	carry_out(base, journal, &head, uuid);
	return used;
}

/*
 * Commit n single words as one record; they are stored in the order that they are given in.
 * Returns as pk_commit() does.
 */
int64_t pk_commit_words(uint8_t *base, uint64_t journal, uint64_t capacity, uint64_t sequence,
			const uint8_t *uuid, const uint64_t *offsets, const uint64_t *words,
			uint64_t n)
{
	struct record head = { .magic = RECORD_MAGIC, .sequence = sequence };
	uint64_t used = sizeof(head);

	if (!make_scratch(capacity))
		return -2;
	for (uint64_t i = 0; i < n;) {
		struct run r = { offsets[i], 1 };

		while (i + r.words < n && r.words < WORDS &&
		       offsets[i + r.words] == r.offset + 8 * r.words)
			r.words++;
		if (used + sizeof(r) + 8 * r.words > capacity)
			return -1;
		memcpy(scratch + used, &r, sizeof(r));
		memcpy(scratch + used + sizeof(r), words + i, 8 * r.words);
		used += sizeof(r) + 8 * r.words;
		head.runs++;
		i += r.words;
	}
	head.length = used - sizeof(head);
	if (!head.length)
		return 0;
	carry_out(base, journal, &head, uuid);
	return (int64_t)head.length;
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

/* ---------------------------------------------------------------- page tables */

/*
 * Second-stage page tables (VT-d 3.7, 9.8) in a pool: the pages of one domain file.  Levels count
 * from 1.  Pages that nothing reaches are stored in place; live ones only through the journal.
 * Addresses that are read from tables are looked up in the pool before they are followed.
 */
#define PT_READ_WRITE 3ull
#define PT_LARGE 0x80ull
#define PT_ACCESSED_DIRTY 0x300ull
#define PT_SNOOP 0x800ull
#define PT_ADDRESS 0x000ffffffffff000ull
#define PT_COMPARED (PT_ADDRESS | PT_LARGE | PT_READ_WRITE)
#define PT_NONE (~0ull)
#define PT_BROKEN (~1ull)

enum pk_state { PAGE_FREE, PAGE_LIVE, PAGE_NEW, PAGE_DEAD, PAGE_ASIDE };

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
	uint64_t table_reserved[6], leaf_reserved[6];
	const uint64_t *allowed, *tables;	/* start, end; start, end; ... sorted */
	uint64_t n_allowed, n_tables, hint;
	struct pk_finding *found;
	uint64_t max_found, n_found, n_leaves, n_seen, bytes;
};

static uint64_t pt_size(unsigned level)
{
	return 1ull << (12 + 9 * (level - 1));
}

static int pt_is_leaf(uint64_t entry, unsigned level)
{
	return level == 1 || (level <= 3 && entry & PT_LARGE);
}

/* The piece that a physical page is in; NULL: none. */
static const struct pk_piece *piece_at(const struct pk_pool *pool, uint64_t physical)
{
	uint64_t low = 0, high = pool->n_pieces;

	while (low < high) {
		uint64_t middle = (low + high) / 2;
		const struct pk_piece *p = pool->pieces + middle;

		if (physical < p->physical)
			high = middle;
		else if (physical - p->physical >= p->length)
			low = middle + 1;
		else
			return p;
	}
	return NULL;
}

/* The table at a physical address and its page number; NULL: not in the pool. */
static const uint64_t *table_at(const uint8_t *base, const struct pk_pool *pool,
				uint64_t physical, uint64_t *page)
{
	const struct pk_piece *p = physical % PAGE ? NULL : piece_at(pool, physical);

	if (!p)
		return NULL;
	*page = p->first + (physical - p->physical) / PAGE;
	return (const uint64_t *)(base + p->offset + (physical - p->physical));
}

/* Take a free page: its region offset, and its address in *physical. */
static uint64_t take_page(struct pk_pool *pool, uint64_t *physical)
{
	const uint8_t *found = memchr(pool->state + pool->cursor, PAGE_FREE,
				      pool->n_pages - pool->cursor);
	uint64_t page = (uint64_t)(found - pool->state), low = 0, high = pool->n_pieces;

	pool->state[page] = PAGE_NEW;
	pool->cursor = page + 1;
	while (high - low > 1) {
		uint64_t middle = (low + high) / 2;

		if (page < pool->pieces[middle].first)
			high = middle;
		else
			low = middle;
	}
	*physical = pool->pieces[low].physical + (page - pool->pieces[low].first) * PAGE;
	return pool->pieces[low].offset + (page - pool->pieces[low].first) * PAGE;
}

/* Whether a physical address is that of a table that was found by the walk. */
int pk_pt_is_live(const struct pk_pool *pool, uint64_t physical)
{
	const struct pk_piece *p = physical % PAGE ? NULL : piece_at(pool, physical);

	return p && pool->state[p->first + (physical - p->physical) / PAGE] == PAGE_LIVE;
}

/* Count n pages as taken; 0: there are not so many, and none must be taken. */
static int want_pages(struct pk_pool *pool, uint64_t n)
{
	pool->wanted += n;
	if (pool->peak < pool->wanted)
		pool->peak = pool->wanted;
	return pool->peak <= pool->free;
}

/* A page for a table: its physical address; PT_NONE: no page. */
uint64_t pk_pt_take(struct pk_pool *pool)
{
	uint64_t physical;

	if (!want_pages(pool, 1))
		return PT_NONE;
	take_page(pool, &physical);
	return physical;
}

/* A reachable page will be free with the commit; one that is not reachable yet is so now. */
void pk_pt_give_back(struct pk_pool *pool, uint64_t physical)
{
	const struct pk_piece *p = piece_at(pool, physical);
	uint64_t page;

	if (!p)
		return;
	page = p->first + (physical - p->physical) / PAGE;
	if (pool->state[page] == PAGE_NEW) {
		pool->state[page] = PAGE_FREE;
		pool->wanted--;
		if (page < pool->cursor)
			pool->cursor = page;
	} else if (pool->state[page] == PAGE_LIVE) {
		pool->state[page] = PAGE_DEAD;
	}
}

/* A run of leaves into those of n entries that are not present. */
void pk_pt_fill(uint64_t *entries, uint64_t first, uint64_t step, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (!(entries[i] & PT_READ_WRITE))
			entries[i] = first + i * step;
}

static uint64_t build(uint8_t *base, struct pk_pool *pool, unsigned level, unsigned leaf,
		      uint64_t physical, uint64_t bits)
{
	uint64_t words[WORDS], at, offset = take_page(pool, &at);

	if (level == leaf) {
		uint64_t first = physical | bits | (level > 1 ? PT_LARGE : 0);
		uint64_t *entries = (uint64_t *)(base + offset);

		for (uint64_t i = 0; i < WORDS; i++)
			entries[i] = first + i * pt_size(level);
		if (tracing)
			trace(offset, base + offset, PAGE);
		return at;
	}
	for (unsigned i = 0; i < WORDS; i++)
		words[i] = PT_READ_WRITE |
			   build(base, pool, level - 1, leaf, physical + i * pt_size(level), bits);
	put_words(base, offset, words, WORDS);
	return at;
}

/*
 * A new table, full, that maps consecutive memory with leaves of one level.  Returns its physical
 * address; PT_NONE: not enough pages.
 */
uint64_t pk_pt_build(uint8_t *base, struct pk_pool *pool, unsigned level, unsigned leaf,
		     uint64_t physical, uint64_t bits)
{
	uint64_t n = 1;

	for (unsigned i = leaf; i < level; i++)
		n = 1 + WORDS * n;
	return want_pages(pool, n) ? build(base, pool, level, leaf, physical, bits) : PT_NONE;
}

/* The first of n entries that is present and not what a run of leaves has there; n: none. */
uint64_t pk_pt_conflict(const uint64_t *entries, uint64_t first, uint64_t step, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (entries[i] & PT_READ_WRITE && (entries[i] & PT_COMPARED) != first + i * step)
			return i;
	return n;
}

/* Whether one of n entries is present. */
int pk_pt_any(const uint64_t *entries, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (entries[i] & PT_READ_WRITE)
			return 1;
	return 0;
}

/* The leaf that can stand for a whole table of leaves of size step; 0: none can. */
uint64_t pk_pt_merged(const uint64_t *entries, uint64_t step)
{
	const uint64_t same = PT_COMPARED | PT_SNOOP;
	uint64_t first = entries[0] & same, used = 0;

	if (!(first & PT_READ_WRITE) || (first & PT_ADDRESS) % (WORDS * step))
		return 0;
	if (step > PAGE && !(first & PT_LARGE))
		return 0;
	for (uint64_t i = 0; i < WORDS; i++) {
		if ((entries[i] & same) != first + i * step)
			return 0;
		used |= entries[i] & PT_ACCESSED_DIRTY;
	}
	return first | used | PT_LARGE;
}

/*
 * The offset in bytes, from what the table maps first, of the first page that is mapped otherwise
 * than to consecutive memory from physical on; PT_NONE: none is.
 */
uint64_t pk_pt_verify(const uint8_t *base, const struct pk_pool *pool, uint64_t table,
		      unsigned level, uint64_t physical, uint64_t bits)
{
	uint64_t page, size = pt_size(level);
	const uint64_t *entries = table_at(base, pool, table, &page);

	if (!entries)
		return 0;
	for (uint64_t i = 0; i < WORDS; i++) {
		uint64_t e = entries[i], expected = physical + i * size, found;

		if (!(e & PT_READ_WRITE))
			continue;
		if (pt_is_leaf(e, level)) {
			if ((e & PT_ADDRESS) != expected || (e & PT_READ_WRITE) != bits)
				return i * size;
			continue;
		}
		found = pk_pt_verify(base, pool, e & PT_ADDRESS, level - 1, expected, bits);
		if (found != PT_NONE)
			return i * size + found;
	}
	return PT_NONE;
}

/* Give back a table and all below it; returns the bytes that it mapped. */
uint64_t pk_pt_drop(const uint8_t *base, struct pk_pool *pool, uint64_t table, unsigned level)
{
	uint64_t page, bytes = 0;
	const uint64_t *entries = table_at(base, pool, table, &page);

	if (!entries || (pool->state[page] != PAGE_LIVE && pool->state[page] != PAGE_NEW))
		return 0;
	pk_pt_give_back(pool, table);
	for (uint64_t i = 0; i < WORDS; i++) {
		if (!(entries[i] & PT_READ_WRITE))
			continue;
		bytes += pt_is_leaf(entries[i], level) ? pt_size(level) :
			pk_pt_drop(base, pool, entries[i] & PT_ADDRESS, level - 1);
	}
	return bytes;
}

/*
 * A copy of a table and all below it whose leaves have other permissions; the old ones are given
 * back, and the bytes mapped are added to *bytes.  Returns its physical address; PT_NONE: not
 * enough pages (all that it takes are counted); PT_BROKEN: one of them is no table of the pool.
 */
uint64_t pk_pt_copy(uint8_t *base, struct pk_pool *pool, uint64_t table, unsigned level,
		    uint64_t bits, uint64_t *bytes)
{
	uint64_t words[WORDS], page, to, offset = 0;
	const uint64_t *entries = table_at(base, pool, table, &page);
	int room;

	if (!entries || pool->state[page] != PAGE_LIVE)
		return PT_BROKEN;
	room = want_pages(pool, 1);
	if (room)
		offset = take_page(pool, &to);
	pool->state[page] = PAGE_DEAD;
	for (uint64_t i = 0; i < WORDS; i++) {
		uint64_t e = entries[i];

		if (!(e & PT_READ_WRITE)) {
			words[i] = 0;
		} else if (pt_is_leaf(e, level)) {
			words[i] = (e & ~PT_READ_WRITE) | bits;
			*bytes += pt_size(level);
		} else {
			uint64_t child = pk_pt_copy(base, pool, e & PT_ADDRESS, level - 1, bits,
						    bytes);

			if (child == PT_BROKEN)
				return PT_BROKEN;
			words[i] = (e & ~PT_ADDRESS) | child;
			room = room && child != PT_NONE;
		}
	}
	if (!room)
		return PT_NONE;
	put_words(base, offset, words, WORDS);
	return to;
}

struct scan {
	const uint8_t *base;
	const struct pk_pool *pool;
	uint64_t from, to;
	struct pk_mapping *out;
	uint64_t max, n, budget;
	int failed;
};

/* Returns 0 to stop: no room for another mapping, or failed. */
static int scan_table(struct scan *s, uint64_t table, unsigned level, uint64_t iova, uint64_t bits)
{
	uint64_t page, size = pt_size(level), i = 0;
	const uint64_t *entries = table_at(s->base, s->pool, table, &page);

	if (!entries || !s->budget--) {
		s->failed = 1;
		return 0;
	}
	if (s->from > iova)
		i = (s->from - iova) / size;
	for (; i < WORDS; i++) {
		uint64_t e = entries[i], at = iova + i * size;
		struct pk_mapping *last = s->out + s->n - 1;

		if (at >= s->to)
			return 1;
		if (!(e & PT_READ_WRITE))
			continue;
		if (!pt_is_leaf(e, level)) {
			if (!scan_table(s, e & PT_ADDRESS, level - 1, at, bits & e))
				return 0;
			continue;
		}
		if (s->n && last->iova + last->length == at && last->bits == (bits & e) &&
		    last->physical + last->length == (e & PT_ADDRESS)) {
			last->length += size;
			continue;
		}
		if (s->n == s->max) {
			s->from = at;
			return 0;
		}
		s->out[s->n++] = (struct pk_mapping){ at, e & PT_ADDRESS, size, bits & e };
	}
	return 1;
}

/*
 * Up to max mappings from *from on, neighbours joined; *from is where to go on (PT_NONE: done).
 * Returns their number; -1: a table outside the pool, or more tables than the pool has pages.
 */
int64_t pk_pt_scan(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
		   uint64_t *from, uint64_t to, struct pk_mapping *out, uint64_t max)
{
	struct scan s = { base, pool, *from, to, out, max, 0, pool->n_pages + 8, 0 };
	int done = scan_table(&s, root, levels, 0, PT_READ_WRITE);

	if (s.failed)
		return -1;
	*from = done ? PT_NONE : s.from;
	return (int64_t)s.n;
}

enum pk_code { FOUND_OUTSIDE = 1, FOUND_TWICE, FOUND_RESERVED, FOUND_LEAF, FOUND_TABLE_DATA };

static void note(struct pk_check *c, uint64_t code, unsigned level, uint64_t iova, uint64_t where,
		 uint64_t value)
{
	if (c->n_found < c->max_found)
		c->found[c->n_found] = (struct pk_finding){ code, level, iova, where, value };
	c->n_found++;
}

/* The last of n sorted ranges that starts at or before an address; n: none. */
static uint64_t range_at(const uint64_t *ranges, uint64_t n, uint64_t address)
{
	uint64_t low = 0, high = n;

	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (ranges[2 * middle] <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low ? low - 1 : n;
}

static int is_within(struct pk_check *c, uint64_t start, uint64_t end)
{
	uint64_t i = c->hint;

	if (i >= c->n_allowed || start < c->allowed[2 * i] || start >= c->allowed[2 * i + 1])
		i = range_at(c->allowed, c->n_allowed, start);
	c->hint = i;
	return i < c->n_allowed && end <= c->allowed[2 * i + 1];
}

/* Whether a range has a byte in common with one of the sorted ranges. */
static int overlaps(const uint64_t *ranges, uint64_t n, uint64_t start, uint64_t end)
{
	uint64_t i = range_at(ranges, n, end - 1);

	return i < n && ranges[2 * i + 1] > start;
}

static void check_leaf(struct pk_check *c, uint64_t e, unsigned level, uint64_t iova,
		       uint64_t where)
{
	uint64_t address = e & PT_ADDRESS & ~(pt_size(level) - 1), end = address + pt_size(level);

	c->n_leaves++;
	c->bytes += pt_size(level);
	if (e & c->leaf_reserved[level])
		note(c, FOUND_RESERVED, level, iova, where, e);
	if (is_within(c, address, end))
		return;
	note(c, overlaps(c->tables, c->n_tables, address, end) ? FOUND_TABLE_DATA : FOUND_LEAF,
	     level, iova, where, e);
}

static void check_table(const uint8_t *base, struct pk_pool *pool, struct pk_check *c,
			uint64_t table, unsigned level, uint64_t iova, uint64_t where, uint64_t from)
{
	uint64_t page, size = pt_size(level);
	const uint64_t *entries = table_at(base, pool, table, &page);

	if (!entries) {
		note(c, FOUND_OUTSIDE, level + 1, iova, where, from);
		return;
	}
	if (pool->state[page] != PAGE_FREE) {
		note(c, FOUND_TWICE, level + 1, iova, where, from);
		return;
	}
	pool->state[page] = PAGE_LIVE;
	c->n_seen++;
	for (uint64_t i = 0; i < WORDS; i++) {
		uint64_t e = entries[i], at = iova + i * size;

		if (!(e & PT_READ_WRITE))
			continue;
		if (pt_is_leaf(e, level)) {
			check_leaf(c, e, level, at, table + 8 * i);
			continue;
		}
		if (e & c->table_reserved[level])
			note(c, FOUND_RESERVED, level, at, table + 8 * i, e);
		check_table(base, pool, c, e & PT_ADDRESS, level - 1, at, table + 8 * i, e);
	}
}

/*
 * Walk all that can be reached from root, each table once, and mark it in the pool (whose pages
 * are all free before); what is wrong goes to c.
 */
void pk_pt_check(const uint8_t *base, struct pk_pool *pool, struct pk_check *c, uint64_t root,
		 unsigned levels)
{
	check_table(base, pool, c, root, levels, 0, root, root);
}

struct visit {
	const uint8_t *base;
	const struct pk_pool *pool;
	uint8_t *seen;			/* of each page, a bit for each level that it was visited as */
	const struct pk_pool *memory;	/* what to mark, and where */
	uint8_t *blocks;
	const uint64_t *ranges;		/* or what to look for */
	uint64_t n_ranges, found;
	int failed;
};

/* The first piece that ends behind a physical address; NULL: none. */
static const struct pk_piece *piece_from(const struct pk_pool *pool, uint64_t physical)
{
	uint64_t low = 0, high = pool->n_pieces;

	while (low < high) {
		uint64_t middle = (low + high) / 2;
		const struct pk_piece *p = pool->pieces + middle;

		if (p->physical + p->length > physical)
			high = middle;
		else
			low = middle + 1;
	}
	return low < pool->n_pieces ? pool->pieces + low : NULL;
}

static void mark_blocks(struct visit *v, uint64_t start, uint64_t end)
{
	const struct pk_piece *p = piece_from(v->memory, start);

	for (; p && p < v->memory->pieces + v->memory->n_pieces && p->physical < end; p++) {
		uint64_t from = start > p->physical ? start - p->physical : 0;
		uint64_t to = end - p->physical < p->length ? end - p->physical : p->length;
		uint64_t first = (p->offset + from) / HUGE_PAGE;
		uint64_t last = (p->offset + to - 1) / HUGE_PAGE;

		memset(v->blocks + first, 1, last - first + 1);
	}
}

/*
 * Returns 0 to stop: found. A table elsewhere is passed by, and one that was visited as a table of
 * this level before: so all that can be reached is visited, and it ends, whatever refers to what.
 */
static int visit_table(struct visit *v, uint64_t table, unsigned level, uint64_t iova)
{
	uint64_t page, size = pt_size(level);
	const uint64_t *entries = table_at(v->base, v->pool, table, &page);

	if (!entries) {
		v->failed = 1;
		return 1;
	}
	if (v->seen[page] & 1u << level)
		return 1;
	v->seen[page] |= (uint8_t)(1u << level);
	for (uint64_t i = 0; i < WORDS; i++) {
		uint64_t e = entries[i], at = iova + i * size, start;

		if (!(e & PT_READ_WRITE))
			continue;
		if (!pt_is_leaf(e, level)) {
			if (!visit_table(v, e & PT_ADDRESS, level - 1, at))
				return 0;
			continue;
		}
		start = e & PT_ADDRESS & ~(size - 1);
		if (v->blocks) {
			mark_blocks(v, start, start + size);
		} else if (overlaps(v->ranges, v->n_ranges, start, start + size)) {
			v->found = at;
			return 0;
		}
	}
	return 1;
}

/*
 * Set blocks[n] for each 2 MiB block n of the region that a leaf maps a byte of; memory says where
 * the region's physical addresses are, seen has a zero for each page of the pool.  Returns 0; -1:
 * not all could be reached.
 */
int pk_pt_mark(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
	       const struct pk_pool *memory, uint8_t *blocks, uint8_t *seen)
{
	struct visit v = { base, pool, seen, memory, blocks, NULL, 0, PT_NONE, 0 };

	visit_table(&v, root, levels, 0);
	return v.failed ? -1 : 0;
}

/*
 * The lowest address that is mapped to a byte of one of n sorted ranges (start, end; ...) of
 * physical addresses; PT_NONE: none is.  seen is as for pk_pt_mark().
 */
uint64_t pk_pt_find(const uint8_t *base, const struct pk_pool *pool, uint64_t root,
		    unsigned levels, const uint64_t *ranges, uint64_t n, uint8_t *seen)
{
	struct visit v = { base, pool, seen, NULL, NULL, ranges, n, PT_NONE, 0 };

	visit_table(&v, root, levels, 0);
	return v.found;
}

/* ---------------------------------------------------------------- mapping */

static char bus_line[256];
static size_t bus_length;
static int bus_status;

static void on_bus_error(int number)
{
	ssize_t done = write(2, bus_line, bus_length);

	(void)number, (void)done;
	_exit(bus_status);
}

/* From here on, memory that is not there ends the process with that line and status. */
void pk_exit_on_bus_error(const char *line, int status)
{
	struct sigaction action = { .sa_handler = on_bus_error };

	bus_length = strnlen(line, sizeof(bus_line));
	memcpy(bus_line, line, bus_length);
	bus_status = status;
	sigaction(SIGBUS, &action, NULL);
}

/*
 * Map size bytes of fd, aligned to align (a power of two, 2 MiB or more) so that huge pages are
 * used; fd -1 maps anonymous memory.  Returns NULL and the reason in *error.
 */
uint8_t *pk_map(int fd, uint64_t offset, uint64_t size, uint64_t align, int writable, int *error)
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
	map = mmap(at, size, prot, flags | MAP_FIXED, fd, (off_t)offset);
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

/* ---------------------------------------------------------------- registers of an IOMMU unit */

/*
 * Steps on a unit's registers, in a row and without the interpreter between them: while the unit's
 * queue is not the kernel's, the kernel may be waiting.  iommu/registers.py has the same numbers.
 */
enum { STEP_WRITE_32, STEP_WRITE_64, STEP_COMMAND, STEP_WAIT_32, STEP_WAIT_64, STEP_WAIT_SAME,
       STEP_WAIT_MEMORY };
#define MMIO_GCMD 0x18
#define MMIO_GSTS 0x1c
#define MMIO_KEPT 0x96ffffffu	/* what a store into GCMD repeats of GSTS (VT-d 11.4.4.1) */

struct pk_step { uint64_t kind, offset, value, mask; };

/* Loads and stores of registers have the register's width, and are never repeated or joined. */
uint32_t pk_mmio_read32(const uint8_t *registers, uint64_t offset)
{
	return *(const volatile uint32_t *)(registers + offset);
}

uint64_t pk_mmio_read64(const uint8_t *registers, uint64_t offset)
{
	return *(const volatile uint64_t *)(registers + offset);
}

static void mmio_write32(uint8_t *registers, uint64_t offset, uint32_t value)
{
	*(volatile uint32_t *)(registers + offset) = value;
}

static int step_is_done(const uint8_t *registers, const uint8_t *memory, const struct pk_step *s)
{
	switch (s->kind) {
	case STEP_WAIT_32:
		return (pk_mmio_read32(registers, s->offset) & s->mask) == s->value;
	case STEP_WAIT_64:
		return (pk_mmio_read64(registers, s->offset) & s->mask) == s->value;
	case STEP_WAIT_SAME:
		return pk_mmio_read64(registers, s->offset) == pk_mmio_read64(registers, s->value);
	case STEP_WAIT_MEMORY:
		return *(const volatile uint32_t *)(memory + s->offset) == s->value;
	}
	return 1;
}

static uint64_t monotonic_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Returns 0 if a wait was in vain for so long. */
static int do_step(uint8_t *registers, const uint8_t *memory, const struct pk_step *s, uint64_t ns)
{
	uint64_t start;
	uint32_t in_force;

	/* What was stored to memory is there before the unit is told to look. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	switch (s->kind) {
	case STEP_WRITE_32:
		mmio_write32(registers, s->offset, (uint32_t)s->value);
		return 1;
	case STEP_WRITE_64:
		*(volatile uint64_t *)(registers + s->offset) = s->value;
		return 1;
	case STEP_COMMAND:
		in_force = pk_mmio_read32(registers, MMIO_GSTS) & MMIO_KEPT;
		in_force = (in_force & ~(uint32_t)s->mask) | (uint32_t)s->value;
		mmio_write32(registers, MMIO_GCMD, in_force);
		return 1;
	}
	start = monotonic_ns();
	while (!step_is_done(registers, memory, s))
		if (monotonic_ns() - start > ns)
			return step_is_done(registers, memory, s);
	return 1;
}

/* Do steps up to the first wait in vain, and then last in any case; whether all was done. */
int pk_mmio_run(uint8_t *registers, const uint8_t *memory, const struct pk_step *steps, uint64_t n,
		const struct pk_step *last, uint64_t n_last, uint64_t nanoseconds)
{
	int done = 1;

	for (uint64_t i = 0; i < n && done; i++)
		done = do_step(registers, memory, &steps[i], nanoseconds);
	for (uint64_t i = 0; i < n_last; i++)
		done &= do_step(registers, memory, &last[i], nanoseconds);
	return done;
}

/* Write cache lines back to memory, for a unit that reads it without asking the caches. */
void pk_flush_lines(const uint8_t *p, uint64_t n)
{
#if defined(__x86_64__)
	const uint8_t *end = p + n;

	for (p = (const uint8_t *)((uintptr_t)p & ~(uintptr_t)63); p < end; p += 64)
		__asm__ volatile("clflush (%0)" : : "r"(p) : "memory");
#endif
	(void)p;
	(void)n;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* f_type of the file system that fd is on; 0 if it cannot be told. */
uint64_t pk_fs_magic(int fd)
{
	struct statfs s;

	return fstatfs(fd, &s) ? 0 : (uint64_t)s.f_type;
}
