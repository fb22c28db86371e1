/*
 * Mappings of a region, and what happens when their memory turns out not to be there.
 *
 * Threads: the line that a bus error writes is set once, before there are threads.
 */
#include "native.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

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

	if (align < BLOCK)
		align = BLOCK;
	/* Else the mapping could begin before the room that is made for it. */
	if (align & (align - 1) || size > UINT64_MAX - align) {
		*error = EINVAL;
		return NULL;
	}
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

/* f_type of the file system that fd is on; 0 if it cannot be told. */
uint64_t pk_fs_magic(int fd)
{
	struct statfs s;

	return fstatfs(fd, &s) ? 0 : (uint64_t)s.f_type;
}
