/*
 * The redo journal (docs/format.md, section 9): a change of several pages or words as one record.
 *
 * Threads: one at a time may commit, to whichever region: a record is put together in scratch.
 * Reading a journal has no state.
 */
#include "native.h"

#define WORDS (PAGE / 8)
/* Two runs of changed words with no more than this between them are one run. */
#define GAP 2

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
#define COVERED_FROM 16			/* offset of sequence: what checksum covers starts here */

struct run { uint64_t offset, words; };

_Static_assert(sizeof(struct record) == RECORD_BYTES && sizeof(struct run) == RUN_BYTES,
	       "layout.py declares them as well");

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

/* Whether a region of size bytes has that journal in it, with room for a record. */
static int has_journal(uint64_t size, uint64_t journal, uint64_t capacity)
{
	return capacity >= sizeof(struct record) && capacity <= size && journal <= size - capacity &&
	       journal % 8 == 0;
}

/*
 * Commit n page images as one: fresh ones in place, the changed words of the others through the
 * journal.  images holds n pages one after the other, numbers their page numbers, fresh one byte
 * each.  Returns the length of the record, COMMIT_TOO_LARGE if the journal is too small for it,
 * COMMIT_NO_MEMORY, or COMMIT_OUTSIDE if a page or the journal is not inside size bytes; then no
 * page that is in use was touched.
 */
int64_t pk_commit(uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		  uint64_t sequence, const uint8_t *uuid, uint8_t *images, const uint64_t *numbers,
		  const uint8_t *fresh, uint64_t n)
{
	struct record head = { .magic = RECORD_MAGIC, .sequence = sequence };
	int64_t used = 0;

	if (!has_journal(size, journal, capacity))
		return COMMIT_OUTSIDE;
	if (!make_scratch(capacity))
		return COMMIT_NO_MEMORY;
	for (uint64_t i = 0; i < n; i++) {
		if (numbers[i] >= size / PAGE)
			return COMMIT_OUTSIDE;
		seal(images + i * PAGE);
	}
	for (uint64_t i = 0; i < n; i++) {
		if (fresh[i])
			continue;
		used = diff_page(scratch + sizeof(head), (uint64_t)used, capacity - sizeof(head),
				 numbers[i] * PAGE, base + numbers[i] * PAGE, images + i * PAGE,
				 &head.runs);
		if (used < 0)
			return COMMIT_TOO_LARGE;
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
int64_t pk_commit_words(uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
			uint64_t sequence, const uint8_t *uuid, const uint64_t *offsets,
			const uint64_t *words, uint64_t n)
{
	struct record head = { .magic = RECORD_MAGIC, .sequence = sequence };
	uint64_t used = sizeof(head);

	if (!has_journal(size, journal, capacity))
		return COMMIT_OUTSIDE;
	for (uint64_t i = 0; i < n; i++)
		if (offsets[i] % 8 || offsets[i] > size - 8)
			return COMMIT_OUTSIDE;
	if (!make_scratch(capacity))
		return COMMIT_NO_MEMORY;
	for (uint64_t i = 0; i < n;) {
		struct run r = { offsets[i], 1 };

		while (i + r.words < n && r.words < WORDS &&
		       offsets[i + r.words] == r.offset + 8 * r.words)
			r.words++;
		if (used + sizeof(r) + 8 * r.words > capacity)
			return COMMIT_TOO_LARGE;
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
 * What a journal holds: JOURNAL_EMPTY; JOURNAL_PENDING, a whole record (its runs stay inside the
 * region and outside the journal); JOURNAL_DAMAGED.
 */
int pk_journal_state(const uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		     const uint8_t *uuid)
{
	const uint8_t *runs;
	struct record head;
	uint64_t at = 0, count = 0;

	if (!has_journal(size, journal, capacity))
		return JOURNAL_DAMAGED;
	runs = base + journal + sizeof(head);
	memcpy(&head, base + journal, sizeof(head));
	if (!head.commit)
		return JOURNAL_EMPTY;
	if (head.magic != RECORD_MAGIC || head.commit != head.sequence ||
	    memcmp(head.uuid, uuid, 16) || head.length > capacity - sizeof(head) ||
	    record_crc(base + journal, head.length) != head.checksum)
		return JOURNAL_DAMAGED;
	while (at < head.length) {
		struct run r;
		uint64_t bytes;

		if (head.length - at < sizeof(r))
			return JOURNAL_DAMAGED;
		memcpy(&r, runs + at, sizeof(r));
		if (!r.words || r.words > WORDS || r.words > (head.length - at - sizeof(r)) / 8)
			return JOURNAL_DAMAGED;
		bytes = 8 * r.words;
		if (r.offset % 8 || r.offset > size || bytes > size - r.offset)
			return JOURNAL_DAMAGED;
		if (r.offset < journal + capacity && r.offset + bytes > journal)
			return JOURNAL_DAMAGED;
		at += sizeof(r) + bytes;
		count++;
	}
	return count == head.runs ? JOURNAL_PENDING : JOURNAL_DAMAGED;
}

/* Carry out the record if it is whole; any number of times is once.  Returns what there was. */
int pk_journal_replay(uint8_t *base, uint64_t size, uint64_t journal, uint64_t capacity,
		      const uint8_t *uuid)
{
	int state = pk_journal_state(base, size, journal, capacity, uuid);
	struct record head;

	if (state != JOURNAL_PENDING)
		return state;
	memcpy(&head, base + journal, sizeof(head));
	apply(base, base + journal + sizeof(head), head.length);
	pk_store_u64(base, journal, 0);
	return state;
}
