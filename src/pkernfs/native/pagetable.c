/*
 * Loops over second-stage page tables (VT-d 3.7, 9.8) in a pool: the pages of one domain file.
 *
 * Levels count from 1.  Pages that nothing reaches are stored in place; reachable ones only through
 * the journal.  All that follows references from table to table is a visitor of walk(), which looks
 * an address up in the pool before it follows it, and goes down one level with each reference: so
 * no depth and no address is taken from a table.
 *
 * Threads: all state is the caller's pool, which one thread uses at a time.
 */
#include "native.h"

#define WORDS PT_ENTRIES
#define PT_COMPARED (PT_ADDRESS | PT_LARGE | PT_READ_WRITE)

static uint64_t pt_size(unsigned level)
{
	return 1ull << (PT_PAGE_SHIFT + PT_LEVEL_BITS * (level - 1));
}

static int pt_is_leaf(uint64_t entry, unsigned level)
{
	return level == 1 || (level <= PT_MAX_LEAF_LEVEL && entry & PT_LARGE);
}

/* ---------------------------------------------------------------- pages */

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

/* The piece that the page at a physical address is in, and its number; NULL: not in the pool. */
static const struct pk_piece *page_at(const struct pk_pool *pool, uint64_t physical, uint64_t *page)
{
	const struct pk_piece *p = physical % PAGE ? NULL : piece_at(pool, physical);

	if (!p)
		return NULL;
	*page = p->first + (physical - p->physical) / PAGE;
	return *page < pool->n_pages ? p : NULL;
}

/* Whether a physical address is that of a table that was found by the walk, and is still wanted. */
int pk_pt_is_reachable(const struct pk_pool *pool, uint64_t physical)
{
	uint64_t page;

	return page_at(pool, physical, &page) && pool->state[page] == PAGE_REACHABLE;
}

/* Count n pages as taken; 0: there are not so many, and none must be taken. */
static int want_pages(struct pk_pool *pool, uint64_t n)
{
	pool->wanted += n;
	if (pool->peak < pool->wanted)
		pool->peak = pool->wanted;
	return pool->peak <= pool->free;
}

/* Take a free page: its region offset, and its physical address; 0: there is none. */
static int take_page(struct pk_pool *pool, uint64_t *offset, uint64_t *physical)
{
	const uint8_t *found = memchr(pool->state + pool->cursor, PAGE_FREE,
				      pool->n_pages - pool->cursor);
	uint64_t page, low = 0, high = pool->n_pieces;

	if (!found)
		return 0;
	page = (uint64_t)(found - pool->state);
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
	*offset = pool->pieces[low].offset + (page - pool->pieces[low].first) * PAGE;
	return 1;
}

/* A page for a table: its physical address; PT_NONE: no page. */
uint64_t pk_pt_alloc(struct pk_pool *pool)
{
	uint64_t offset, physical;

	return want_pages(pool, 1) && take_page(pool, &offset, &physical) ? physical : PT_NONE;
}

/* A reachable page will be free with the commit; one that is not reachable yet is so now. */
void pk_pt_free(struct pk_pool *pool, uint64_t physical)
{
	uint64_t page;

	if (!page_at(pool, physical, &page))
		return;
	if (pool->state[page] == PAGE_NEW) {
		pool->state[page] = PAGE_FREE;
		pool->wanted--;
		if (page < pool->cursor)
			pool->cursor = page;
	} else if (pool->state[page] == PAGE_REACHABLE) {
		pool->state[page] = PAGE_FREED;
	}
}

/* ---------------------------------------------------------------- entries of one table */

/* A run of leaves into those of n entries that are not present. */
void pk_pt_fill(uint64_t *entries, uint64_t first, uint64_t step, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		if (!(entries[i] & PT_READ_WRITE))
			entries[i] = first + i * step;
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

/* ---------------------------------------------------------------- new tables */

static uint64_t build(uint8_t *base, struct pk_pool *pool, unsigned level, unsigned leaf,
		      uint64_t physical, uint64_t bits)
{
	uint64_t words[WORDS], at, offset;

	if (!take_page(pool, &offset, &at))
		return PT_NONE;
	if (level == leaf) {
		uint64_t first = physical | bits | (level > 1 ? PT_LARGE : 0);
		uint64_t *entries = (uint64_t *)(base + offset);

		for (uint64_t i = 0; i < WORDS; i++)
			entries[i] = first + i * pt_size(level);
		trace_stored(base, offset, PAGE);
		return at;
	}
	for (unsigned i = 0; i < WORDS; i++) {
		uint64_t below = build(base, pool, level - 1, leaf, physical + i * pt_size(level),
				       bits);

		if (below == PT_NONE)
			return PT_NONE;
		words[i] = PT_READ_WRITE | below;
	}
	put_words(base, offset, words, WORDS);
	return at;
}

/*
 * A new table, full, that maps consecutive memory with leaves of one level.  Returns its physical
 * address; PT_NONE: not enough pages, or there are no such levels.
 */
uint64_t pk_pt_build(uint8_t *base, struct pk_pool *pool, unsigned level, unsigned leaf,
		     uint64_t physical, uint64_t bits)
{
	uint64_t n = 1;

	if (leaf < 1 || leaf > PT_MAX_LEAF_LEVEL || level < leaf || level > PT_MAX_LEVEL)
		return PT_NONE;
	for (unsigned i = leaf; i < level; i++)
		n = 1 + WORDS * n;
	return want_pages(pool, n) ? build(base, pool, level, leaf, physical, bits) : PT_NONE;
}

/* ---------------------------------------------------------------- the walk */

/* What a visitor wants: go on (into the table), pass it by, or end the walk. */
enum way { GO_ON, PASS_BY, END };

/* A table that the walk has come to. */
struct table {
	const uint64_t *entries;	/* NULL: it is not in the pool */
	uint64_t physical, page;	/* page: its number in the pool */
	uint64_t iova;			/* that its first entry translates */
	uint64_t where, entry;		/* the address of what refers to it, and what that holds */
	uint64_t bits;			/* R and W of all that led to it */
	unsigned level, next;		/* next: index of the entry to look at next */
};

/*
 * What is done on the way.  walk() is inlined where its visitor is a constant, and the visitor's
 * functions into it, so that a walk costs no call but for what a visitor itself calls.
 */
struct visitor {
	/* A table, before it is gone into; it may move t->next. */
	enum way (*enter)(void *state, struct table *t);
	/* A leaf in it. */
	enum way (*leaf)(void *state, const struct table *t, unsigned level, uint64_t iova,
			 uint64_t entry);
	/* A table is done, and all below it; may be NULL. */
	void (*leave)(void *state, const struct table *t);
};

#define INLINED static inline __attribute__((always_inline))
/* A branch, not arithmetic that waits for the entry: in large tables nearly all is present. */
#define is_mostly(condition) __builtin_expect_with_probability(!!(condition), 1, 0.99)

static void look_up(const uint8_t *base, const struct pk_pool *pool, struct table *t)
{
	const struct pk_piece *p = page_at(pool, t->physical, &t->page);

	t->entries = p ? (const uint64_t *)(base + p->offset + (t->physical - p->physical)) : NULL;
}

/* Visit leaves from t->next on.  Returns the index of the first reference; WORDS; or beyond: END. */
INLINED unsigned visit_leaves(const struct visitor visitor, void *state, const struct table *t,
			      unsigned level)
{
	const uint64_t *entries = t->entries, first = t->iova;

	for (unsigned i = t->next; i < WORDS; i++) {
		uint64_t e = entries[i];

		if (!is_mostly(e & PT_READ_WRITE))
			continue;
		if (!pt_is_leaf(e, level))
			return i;
		if (visitor.leaf(state, t, level, first + i * pt_size(level), e) == END)
			return WORDS + 1;
	}
	return WORDS;
}

/*
 * Visit the tables below root, which is one of so many levels, and their leaves, in order of the
 * addresses that they translate.  Which tables are gone into, and so whether it ends soon, is up to
 * the visitor: a table may be referred to any number of times.
 */
INLINED void walk(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
		  const struct visitor visitor, void *state)
{
	struct table path[PT_MAX_LEVEL + 1];	/* by level */
	int has_levels = levels >= 1 && levels <= PT_MAX_LEVEL, is_new = 1;
	struct table *t = path + (has_levels ? levels : 0);

	*t = (struct table){ .physical = has_levels ? root : PT_NONE, .where = root, .entry = root,
			     .bits = PT_READ_WRITE, .level = levels };
	for (;;) {
		unsigned i;

		if (is_new) {
			enum way way;

			look_up(base, pool, t);
			way = visitor.enter(state, t);
			if (way == END)
				return;
			is_new = 0;
			if (way == PASS_BY || !t->entries) {
				if (t->level == levels)
					return;
				t++;
				continue;
			}
		}
		/* Most entries are in tables of level 1: a loop for them that knows it. */
		i = t->level == 1 ? visit_leaves(visitor, state, t, 1) :
				    visit_leaves(visitor, state, t, t->level);
		if (i > WORDS)
			return;
		if (i < WORDS) {
			uint64_t e = t->entries[i];

			t->next = i + 1;
			t[-1] = (struct table){ .physical = e & PT_ADDRESS,
						.iova = t->iova + i * pt_size(t->level),
						.where = t->physical + 8 * i, .entry = e,
						.bits = t->bits & e, .level = t->level - 1 };
			t--;
			is_new = 1;
			continue;
		}
		if (visitor.leave)
			visitor.leave(state, t);
		if (t->level == levels)
			return;
		t++;
	}
}

/* ---------------------------------------------------------------- verify */

struct verify { uint64_t physical, bits, found; };

static enum way verify_table(void *state, struct table *t)
{
	struct verify *v = state;

	if (t->entries)
		return GO_ON;
	v->found = t->iova;
	return END;
}

INLINED enum way verify_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			     uint64_t entry)
{
	struct verify *v = state;

	(void)t, (void)level;
	if ((entry & PT_ADDRESS) == v->physical + iova && (entry & PT_READ_WRITE) == v->bits)
		return GO_ON;
	v->found = iova;
	return END;
}

/*
 * The offset in bytes, from what the table maps first, of the first page that is mapped otherwise
 * than to consecutive memory from physical on; PT_NONE: none is.
 */
uint64_t pk_pt_verify(const uint8_t *base, const struct pk_pool *pool, uint64_t table,
		      unsigned level, uint64_t physical, uint64_t bits)
{
	static const struct visitor visitor = { verify_table, verify_leaf, NULL };
	struct verify v = { physical, bits, PT_NONE };

	walk(base, pool, table, level, visitor, &v);
	return v.found;
}

/* ---------------------------------------------------------------- drop */

struct drop { struct pk_pool *pool; uint64_t bytes; };

static enum way drop_table(void *state, struct table *t)
{
	struct drop *d = state;

	if (!t->entries || (d->pool->state[t->page] != PAGE_REACHABLE &&
			    d->pool->state[t->page] != PAGE_NEW))
		return PASS_BY;
	pk_pt_free(d->pool, t->physical);
	return GO_ON;
}

INLINED enum way drop_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			   uint64_t entry)
{
	struct drop *d = state;

	(void)t, (void)iova, (void)entry;
	d->bytes += pt_size(level);
	return GO_ON;
}

/* Free a table and all below it; returns the bytes that it mapped. */
uint64_t pk_pt_drop(const uint8_t *base, struct pk_pool *pool, uint64_t table, unsigned level)
{
	static const struct visitor visitor = { drop_table, drop_leaf, NULL };
	struct drop d = { pool, 0 };

	walk(base, pool, table, level, visitor, &d);
	return d.bytes;
}

/* ---------------------------------------------------------------- copy */

struct copy {
	uint8_t *base;
	struct pk_pool *pool;
	uint64_t bits, bytes, root;
	int room, broken;
	struct { uint64_t physical, offset, words[WORDS]; } at[PT_MAX_LEVEL + 2];	/* by level */
};

static enum way copy_table(void *state, struct table *t)
{
	struct copy *c = state;

	if (!t->entries || c->pool->state[t->page] != PAGE_REACHABLE) {
		c->broken = 1;
		return END;
	}
	c->room = want_pages(c->pool, 1) && c->room &&
		  take_page(c->pool, &c->at[t->level].offset, &c->at[t->level].physical);
	c->pool->state[t->page] = PAGE_FREED;
	memset(c->at[t->level].words, 0, PAGE);
	return GO_ON;
}

INLINED enum way copy_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			   uint64_t entry)
{
	struct copy *c = state;
	uint64_t size = pt_size(level);

	c->at[level].words[(iova - t->iova) / size] = (entry & ~PT_READ_WRITE) | c->bits;
	c->bytes += size;
	return GO_ON;
}

static void copy_stored(void *state, const struct table *t)
{
	struct copy *c = state;

	if (!c->room)
		return;
	put_words(c->base, c->at[t->level].offset, c->at[t->level].words, WORDS);
	c->root = c->at[t->level].physical;
	c->at[t->level + 1].words[t->where % PAGE / 8] = (t->entry & ~PT_ADDRESS) | c->root;
}

/*
 * A copy of a table and all below it whose leaves have other permissions; the old ones are freed,
 * and the bytes mapped are added to *bytes.  Returns its physical address; PT_NONE: not enough
 * pages (all that it takes are counted); PT_BROKEN: one of them is no table of the pool.
 */
uint64_t pk_pt_copy(uint8_t *base, struct pk_pool *pool, uint64_t table, unsigned level,
		    uint64_t bits, uint64_t *bytes)
{
	static const struct visitor visitor = { copy_table, copy_leaf, copy_stored };
	struct copy c;

	c.base = base;
	c.pool = pool;
	c.bits = bits;
	c.bytes = 0;
	c.root = PT_NONE;
	c.room = 1;
	c.broken = 0;
	walk(base, pool, table, level, visitor, &c);
	*bytes += c.bytes;
	return c.broken ? PT_BROKEN : c.room ? c.root : PT_NONE;
}

/* ---------------------------------------------------------------- scan */

struct scan {
	uint64_t from, to;
	struct pk_mapping *out;
	uint64_t max, n, budget;
	int failed, full;
};

static enum way scan_enter(void *state, struct table *t)
{
	struct scan *s = state;

	if (t->iova >= s->to)
		return END;
	if (!t->entries || !s->budget--) {
		s->failed = 1;
		return END;
	}
	if (s->from > t->iova) {
		uint64_t skipped = (s->from - t->iova) / pt_size(t->level);

		t->next = skipped < WORDS ? (unsigned)skipped : WORDS;
	}
	return GO_ON;
}

INLINED enum way scan_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			   uint64_t entry)
{
	struct scan *s = state;
	uint64_t size = pt_size(level), bits = t->bits & entry, physical = entry & PT_ADDRESS;

	if (iova >= s->to)
		return END;
	if (s->n) {
		struct pk_mapping *last = &s->out[s->n - 1];

		if (last->iova + last->length == iova && last->bits == bits &&
		    last->physical + last->length == physical) {
			last->length += size;
			return GO_ON;
		}
	}
	if (s->n == s->max) {
		s->from = iova;
		s->full = 1;
		return END;
	}
	s->out[s->n++] = (struct pk_mapping){ iova, physical, size, bits };
	return GO_ON;
}

/*
 * Up to max mappings from *from on, neighbours joined; *from is where to go on (PT_NONE: done).
 * Returns their number; -1: a table outside the pool, or more tables than the pool has pages.
 */
int64_t pk_pt_scan(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
		   uint64_t *from, uint64_t to, struct pk_mapping *out, uint64_t max)
{
	static const struct visitor visitor = { scan_enter, scan_leaf, NULL };
	struct scan s = { .from = *from, .to = to, .out = out, .max = max,
			  .budget = pool->n_pages + 8 };

	walk(base, pool, root, levels, visitor, &s);
	if (s.failed)
		return -1;
	*from = s.full ? s.from : PT_NONE;
	return (int64_t)s.n;
}

/* ---------------------------------------------------------------- check */

static __attribute__((cold, noinline)) void
note(struct pk_check *c, uint64_t code, unsigned level, uint64_t iova, uint64_t where,
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

/* Whether all of a range is in one of the sorted ranges; *hint is where the last one was. */
static inline int is_within(const uint64_t *ranges, uint64_t n, uint64_t start, uint64_t end,
			    uint64_t *hint)
{
	uint64_t i = *hint;

	if (i >= n || start < ranges[2 * i] || start >= ranges[2 * i + 1])
		*hint = i = range_at(ranges, n, start);
	return i < n && end <= ranges[2 * i + 1];
}

/* Whether a range has a byte in common with one of the sorted ranges. */
static int overlaps(const uint64_t *ranges, uint64_t n, uint64_t start, uint64_t end)
{
	uint64_t i = range_at(ranges, n, end - 1);

	return i < n && ranges[2 * i + 1] > start;
}

struct checking {
	struct pk_pool *pool;
	struct pk_check *c;
	unsigned levels;
	uint64_t hint, n_leaves, bytes;
};

static enum way check_table(void *state, struct table *t)
{
	const struct checking *k = state;
	struct pk_check *c = k->c;

	if (t->level < k->levels && t->entry & c->table_reserved[t->level + 1])
		note(c, FOUND_RESERVED_BITS, t->level + 1, t->iova, t->where, t->entry);
	if (!t->entries) {
		note(c, FOUND_TABLE_OUTSIDE, t->level + 1, t->iova, t->where, t->entry);
		return PASS_BY;
	}
	if (k->pool->state[t->page] != PAGE_FREE) {
		note(c, FOUND_TABLE_TWICE, t->level + 1, t->iova, t->where, t->entry);
		return PASS_BY;
	}
	k->pool->state[t->page] = PAGE_REACHABLE;
	c->n_seen++;
	return GO_ON;
}

INLINED enum way check_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			    uint64_t entry)
{
	struct checking *k = state;
	struct pk_check *c = k->c;
	uint64_t size = pt_size(level), address = entry & PT_ADDRESS & ~(size - 1);
	uint64_t where = t->physical + 8 * ((iova - t->iova) / size);

	k->n_leaves++;
	k->bytes += size;
	if (entry & c->leaf_reserved[level])
		note(c, FOUND_RESERVED_BITS, level, iova, where, entry);
	if (is_within(c->allowed, c->n_allowed, address, address + size, &k->hint))
		return GO_ON;
	note(c, overlaps(c->tables, c->n_tables, address, address + size) ? FOUND_LEAF_IS_TABLE :
	     FOUND_LEAF_OUTSIDE, level, iova, where, entry);
	return GO_ON;
}

/*
 * Walk all that can be reached from root, each table once, and mark it in the pool (whose pages
 * are all free before); what is wrong goes to c.
 */
void pk_pt_check(const uint8_t *base, struct pk_pool *pool, struct pk_check *c, uint64_t root,
		 unsigned levels)
{
	static const struct visitor visitor = { check_table, check_leaf, NULL };
	struct checking k = { .pool = pool, .c = c, .levels = levels };

	walk(base, pool, root, levels, visitor, &k);
	c->n_leaves = k.n_leaves;
	c->bytes = k.bytes;
}

/* ---------------------------------------------------------------- mark, find */

struct visit {
	uint8_t *seen;			/* of each page, a bit for each level that it was visited as */
	const struct pk_pool *memory;	/* what to mark, and where */
	uint8_t *blocks;
	const uint64_t *ranges;		/* or what to look for */
	uint64_t n_ranges, found;
	int failed;
};

/*
 * A table elsewhere is passed by, and one that was visited as a table of this level before: so all
 * that can be reached is visited, and it ends, whatever refers to what.
 */
static enum way visit_table(void *state, struct table *t)
{
	struct visit *v = state;
	uint8_t bit;

	if (!t->entries) {
		v->failed = 1;
		return PASS_BY;
	}
	bit = (uint8_t)(1u << t->level);
	if (v->seen[t->page] & bit)
		return PASS_BY;
	v->seen[t->page] |= bit;
	return GO_ON;
}

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

INLINED enum way mark_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			   uint64_t entry)
{
	struct visit *v = state;
	uint64_t size = pt_size(level), start = entry & PT_ADDRESS & ~(size - 1);
	uint64_t end = start + size;
	const struct pk_piece *p = piece_from(v->memory, start);

	(void)t, (void)iova;
	for (; p && p < v->memory->pieces + v->memory->n_pieces && p->physical < end; p++) {
		uint64_t from = start > p->physical ? start - p->physical : 0;
		uint64_t to = end - p->physical < p->length ? end - p->physical : p->length;
		uint64_t first = (p->offset + from) / BLOCK;
		uint64_t last = (p->offset + to - 1) / BLOCK;

		v->blocks[first] = 1;	/* most leaves are in one: no call for them */
		if (last > first)
			memset(v->blocks + first, 1, last - first + 1);
	}
	return GO_ON;
}

INLINED enum way find_leaf(void *state, const struct table *t, unsigned level, uint64_t iova,
			   uint64_t entry)
{
	struct visit *v = state;
	uint64_t size = pt_size(level), start = entry & PT_ADDRESS & ~(size - 1);

	(void)t;
	if (!overlaps(v->ranges, v->n_ranges, start, start + size))
		return GO_ON;
	v->found = iova;
	return END;
}

/*
 * Set blocks[n] for each 2 MiB block n of the region that a leaf maps a byte of; memory says where
 * the region's physical addresses are, seen has a zero for each page of the pool.  Returns 0; -1:
 * not all could be reached.
 */
int pk_pt_mark(const uint8_t *base, const struct pk_pool *pool, uint64_t root, unsigned levels,
	       const struct pk_pool *memory, uint8_t *blocks, uint8_t *seen)
{
	static const struct visitor visitor = { visit_table, mark_leaf, NULL };
	struct visit v = { .seen = seen, .memory = memory, .blocks = blocks };

	walk(base, pool, root, levels, visitor, &v);
	return v.failed ? -1 : 0;
}

/*
 * The lowest address that is mapped to a byte of one of n sorted ranges (start, end; ...) of
 * physical addresses; PT_NONE: none is.  seen is as for pk_pt_mark().
 */
uint64_t pk_pt_find(const uint8_t *base, const struct pk_pool *pool, uint64_t root,
		    unsigned levels, const uint64_t *ranges, uint64_t n, uint8_t *seen)
{
	static const struct visitor visitor = { visit_table, find_leaf, NULL };
	struct visit v = { .seen = seen, .ranges = ranges, .n_ranges = n, .found = PT_NONE };

	walk(base, pool, root, levels, visitor, &v);
	return v.found;
}
