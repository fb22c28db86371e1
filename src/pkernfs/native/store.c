/*
 * Every store into a region goes through put_words(), put_bytes(), put_zeros() or put_u64(), or is
 * told to trace_stored(): the tests switch the trace on and rebuild the region as it was between
 * any two of them.  Offsets are region offsets in bytes; the caller has checked them against the
 * size of the region.
 *
 * Threads: none of this has a state but the trace.  While that is on, one thread stores.
 */
#include "native.h"

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

void put_words(uint8_t *base, uint64_t offset, const void *data, uint64_t n)
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

void put_bytes(uint8_t *base, uint64_t offset, const void *data, uint64_t n)
{
	memcpy(base + offset, data, n);
	if (tracing)
		trace(offset, data, n);
}

/* n bytes have been stored by other means. */
void trace_stored(const uint8_t *base, uint64_t offset, uint64_t n)
{
	if (tracing)
		trace(offset, base + offset, n);
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

/*
 * The next three return 1 if memory turned out not to be there (a bus error: pk_exit_on_bus_error):
 * part of the bytes may have been stored then.
 */
int pk_copy(uint8_t *base, uint64_t offset, const uint8_t *data, uint64_t n)
{
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		bus_error_guard = NULL;
		return 1;
	}
	bus_error_guard = &here;
	put_bytes(base, offset, data, n);
	bus_error_guard = NULL;
	return 0;
}

int pk_copy_out(const uint8_t *base, uint64_t offset, uint8_t *data, uint64_t n)
{
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		bus_error_guard = NULL;
		return 1;
	}
	bus_error_guard = &here;
	memcpy(data, base + offset, n);
	bus_error_guard = NULL;
	return 0;
}

int pk_zero(uint8_t *base, uint64_t offset, uint64_t n)
{
	sigjmp_buf here;

	if (sigsetjmp(here, 0)) {
		bus_error_guard = NULL;
		return 1;
	}
	bus_error_guard = &here;
	put_zeros(base, offset, n);
	bus_error_guard = NULL;
	return 0;
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
