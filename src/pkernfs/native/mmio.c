/*
 * Steps on an IOMMU unit's registers, in a row and without the interpreter between them: while the
 * unit's queue is not the kernel's, the kernel may be waiting.  vtd/registers.py declares the steps.
 *
 * Threads: a unit is for one thread at a time; there is no other state.
 */
#include "native.h"

#include <time.h>

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

/* Whether size aligned bytes at an offset are among the first n. */
static int is_inside(uint64_t offset, uint64_t size, uint64_t n)
{
	return offset % size == 0 && n >= size && offset <= n - size;
}

/* Whether a step is of a known kind, and reaches nothing but what it may. */
static int may_do(const struct pk_reach *reach, const struct pk_step *s)
{
	uint64_t n = reach->n_registers;

	switch (s->kind) {
	case STEP_WRITE_32:
	case STEP_WAIT_32:
		return is_inside(s->offset, 4, n);
	case STEP_WRITE_64:
	case STEP_WAIT_64:
		return is_inside(s->offset, 8, n);
	case STEP_WAIT_SAME:
		return is_inside(s->offset, 8, n) && is_inside(s->value, 8, n);
	case STEP_COMMAND:
		return is_inside(MMIO_GCMD, 4, n) && is_inside(MMIO_GSTS, 4, n);
	case STEP_WAIT_MEMORY:
		return reach->memory && is_inside(s->offset, 4, reach->n_memory);
	}
	return 0;
}

/* Returns 0 if a wait was in vain for so long. */
static int do_step(const struct pk_reach *reach, const struct pk_step *s, uint64_t ns)
{
	uint8_t *registers = reach->registers;
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
	while (!step_is_done(registers, reach->memory, s))
		if (monotonic_ns() - start > ns)
			return step_is_done(registers, reach->memory, s);
	return 1;
}

/*
 * Do steps up to the first wait in vain, and then last in any case: RUN_DONE or RUN_IN_VAIN.
 * RUN_OUTSIDE: one of them is no step, or reaches further than it may; then none was done.
 */
int pk_mmio_run(const struct pk_reach *reach, const struct pk_step *steps, uint64_t n,
		const struct pk_step *last, uint64_t n_last, uint64_t nanoseconds)
{
	int done = 1;

	for (uint64_t i = 0; i < n; i++)
		if (!may_do(reach, &steps[i]))
			return RUN_OUTSIDE;
	for (uint64_t i = 0; i < n_last; i++)
		if (!may_do(reach, &last[i]))
			return RUN_OUTSIDE;
	for (uint64_t i = 0; i < n && done; i++)
		done = do_step(reach, &steps[i], nanoseconds);
	for (uint64_t i = 0; i < n_last; i++)
		done &= do_step(reach, &last[i], nanoseconds);
	return done ? RUN_DONE : RUN_IN_VAIN;
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
