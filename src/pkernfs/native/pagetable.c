/*
 * Loops over second-stage page tables (VT-d 3.7, 9.8) in a pool: the pages of one domain file.
 *
 * Levels count from 1.  Pages that nothing reaches are stored in place; live ones only through the
 * journal.  Addresses that are read from tables are looked up in the pool before they are followed.
 *
 * Threads: all state is the caller's pool, which one thread uses at a time.
 */
#include "native.h"

#define WORDS PT_ENTRIES

#define PT_COMPARED (PT_ADDRESS | PT_LARGE | PT_READ_WRITE)
#define PT_NONE (~0ull)
#define PT_BROKEN (~1ull)

enum pk_state { PAGE_FREE, PAGE_LIVE, PAGE_NEW, PAGE_DEAD, PAGE_ASIDE };

static uint64_t pt_size(unsigned level)
{
	return 1ull << (PT_PAGE_SHIFT + PT_LEVEL_BITS * (level - 1));
}

static int pt_is_leaf(uint64_t entry, unsigned level)
{
	return level == 1 || (level <= PT_MAX_LEAF_LEVEL && entry & PT_LARGE);
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
		trace_stored(base, offset, PAGE);
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
		uint64_t first = (p->offset + from) / BLOCK;
		uint64_t last = (p->offset + to - 1) / BLOCK;

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
