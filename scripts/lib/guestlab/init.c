/*
 * The guest's only program. It fills pages of its own memory with numbered records that hold the
 * marker from the kernel command line, says so on the console, and waits to be stopped.
 *
 * The kernel passes parameters that it does not know (marker=, pages=, busy=) on as environment
 * variables. guestlab/memory.py knows the same record format and looks for it in the guest's memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, RECORD_BYTES = 64 };

static void fill_page(char *page, const char *marker, unsigned long number)
{
	for (unsigned int i = 0; i < PAGE_BYTES / RECORD_BYTES; i++) {
		char *record = page + i * RECORD_BYTES;
		int used = snprintf(record, RECORD_BYTES, "%s:%08lx:%02x:", marker, number, i);

		memset(record + used, '.', RECORD_BYTES - 1 - used);
		record[RECORD_BYTES - 1] = '\n';
	}
}

/* Keep storing to memory that is not part of the records, so that a guest can be stopped amid it. */
static void churn(void)
{
	size_t words = 16u << 17;	/* 16 MiB */
	volatile unsigned long *area = calloc(words, sizeof(*area));

	for (unsigned long round = 1; area; round++)
		for (size_t i = 0; i < words; i++)
			area[i] = round;
}

int main(void)
{
	const char *marker = getenv("marker"), *pages_text = getenv("pages");
	unsigned long pages = pages_text ? strtoul(pages_text, NULL, 10) : 0;
	char *area = aligned_alloc(PAGE_BYTES, pages * PAGE_BYTES);

	if (!marker || strlen(marker) > 40 || !pages || !area) {
		puts("guest: no marker, or no memory for the pages");
		return 1;
	}
	for (unsigned long i = 0; i < pages; i++)
		fill_page(area + i * PAGE_BYTES, marker, i);
	printf("guest: user space is up, %s is in %lu pages\n", marker, pages);
	fflush(stdout);
	if (getenv("busy"))
		churn();
	for (;;)
		pause();
}
