/*
 * Mappings of a region, and what happens when their memory turns out not to be there.
 *
 * Threads: the line that a bus error writes is set once, before there are threads. Each has its own
 * guard.
 */
#include "native.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static char bus_line[256];
static size_t bus_length;
static int bus_status;

__thread sigjmp_buf *bus_error_guard;

static void on_bus_error(int number)
{
	ssize_t done;

	if (bus_error_guard)
		siglongjmp(*bus_error_guard, 1);
	done = write(2, bus_line, bus_length);
	(void)number, (void)done;
	_exit(bus_status);
}

/* End the process as a bus error that nobody has a use for. */
void pk_bus_error(void)
{
	raise(SIGBUS);
}

/* From here on, memory that is not there ends the process with that line and status. */
void pk_exit_on_bus_error(const char *line, int status)
{
	/* No signal is blocked while it runs, for it may not return. */
	struct sigaction action = { .sa_handler = on_bus_error, .sa_flags = SA_NODEFER };

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

/* End a mapping of which no view is held: its addresses are free. */
void pk_release(uint8_t *map, uint64_t size)
{
	munmap(map, size);
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

/*
 * Whether all pages of a part of a mapping are in memory, be they mapped here or not.  The kernel
 * says yes to whoever may not write to the file, too (mincore(2)).
 */
int pk_is_resident(const uint8_t *map, uint64_t offset, uint64_t n)
{
	uint64_t at = offset & ~(uint64_t)(PAGE - 1), end = offset + n;
	unsigned char found[4096];

	while (at < end) {
		uint64_t pages = (end - at + PAGE - 1) / PAGE;

		if (pages > sizeof(found))
			pages = sizeof(found);
		if (mincore((void *)(uintptr_t)(map + at), pages * PAGE, found))
			return 0;
		for (uint64_t i = 0; i < pages; i++)
			if (!(found[i] & 1))
				return 0;
		at += pages * PAGE;
	}
	return 1;
}

/* ---------------------------------------------------------------- huge pages that are there */

/*
 * Have faults on the mapping that only a page table entry is missing for handled by us.  This
 * kernel's userfaultfd (5.13 and later) can then be asked to enter the page if the file has it, and
 * answers EFAULT if not: nothing else looks without allocating.  The descriptor or a negative errno.
 */
static int watch_mapping(uint8_t *map, uint64_t size)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MINOR_HUGETLBFS };
	struct uffdio_register all = { .range = { .start = (uintptr_t)map, .len = size },
				       .mode = UFFDIO_REGISTER_MODE_MINOR };
	int error, watch = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (watch < 0)
		return -errno;
	if (!ioctl(watch, UFFDIO_API, &api) && !ioctl(watch, UFFDIO_REGISTER, &all))
		return watch;
	error = errno;
	close(watch);
	return -error;
}

/* The physical address of a page of the mapping, if the file has that page; nobody else maps it. */
static uint64_t existing_address(int watch, int pagemap, uint8_t *at, uint64_t page)
{
	struct uffdio_continue there = { .range = { .start = (uintptr_t)at, .len = page } };
	uint64_t entry, number;

	if (ioctl(watch, UFFDIO_CONTINUE, &there))
		return NO_ADDRESS;
	if (pread(pagemap, &entry, sizeof(entry), (off_t)((uintptr_t)at / PAGE * sizeof(entry))) !=
	    (ssize_t)sizeof(entry))
		return NO_ADDRESS;
	number = entry & ((UINT64_C(1) << 55) - 1);
	return entry >> 63 && number ? number * PAGE : NO_ADDRESS;
}

/*
 * The physical addresses of bytes start..end-1 of a hugetlbfs file, in runs; memory that the file
 * does not have yet has none, and gets none here.  page is the size of its pages, of which start
 * and end are multiples.  Returns how many runs, or a negative errno; as many bytes as fit max runs
 * are looked at.
 */
int64_t pk_existing_runs(int fd, uint64_t start, uint64_t end, uint64_t page, struct pk_existing *out,
			 uint64_t max)
{
	uint64_t n = 0, size = end - start;
	int watch, pagemap, file;
	char name[32];
	uint8_t *map;

	/* Only what could be written to may be watched, though nothing is written here. */
	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	file = open(name, O_RDWR | O_CLOEXEC | O_NONBLOCK);	/* it waits for nobody's lease */
	if (file < 0)
		return -errno;
	map = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_NORESERVE, file, (off_t)start);
	close(file);
	if (map == MAP_FAILED)
		return -errno;
	watch = watch_mapping(map, size);
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	for (uint64_t at = 0; watch >= 0 && pagemap >= 0 && at < size; at += page) {
		uint64_t physical = existing_address(watch, pagemap, map + at, page);
		struct pk_existing *last = n ? &out[n - 1] : NULL;

		if (last && (physical == NO_ADDRESS ? last->physical == NO_ADDRESS
						    : last->physical != NO_ADDRESS &&
						      last->physical + last->length == physical)) {
			last->length += page;
		} else if (n < max) {
			out[n++] = (struct pk_existing){ start + at, page, physical };
		} else {
			break;
		}
	}
	munmap(map, size);
	if (watch >= 0)
		close(watch);
	if (pagemap >= 0)
		close(pagemap);
	return watch < 0 ? watch : pagemap < 0 ? -EACCES : (int64_t)n;
}

/* Give n bytes of a file their memory; nothing of it changes.  0 or an errno. */
int pk_reserve(int fd, uint64_t offset, uint64_t n)
{
	return fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)n) ? errno : 0;
}

/* Zero n bytes of a file; the memory of whole pages among them goes back.  0 or an errno. */
int pk_punch(int fd, uint64_t offset, uint64_t n)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)n)
		       ? errno
		       : 0;
}

/* f_type of the file system that fd is on; 0 if it cannot be told. */
uint64_t pk_fs_magic(int fd)
{
	struct statfs s;

	return fstatfs(fd, &s) ? 0 : (uint64_t)s.f_type;
}

/*
 * Count the bytes of a directory's regular files that have no memory yet.  0 or an errno.
 *
 * In C, because a thread that counts thousands of files in Python has its lock again before
 * another one that waits for it runs.  A file that goes meanwhile counts as gone.
 */
int pk_untouched(int directory, uint64_t *bytes)
{
	int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *d = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	struct stat s;
	int error;

	if (!d) {
		error = errno;
		if (fd >= 0)
			close(fd);
		return error;
	}
	*bytes = 0;
	while (errno = 0, (entry = readdir(d))) {
		if (fstatat(fd, entry->d_name, &s, AT_SYMLINK_NOFOLLOW)) {
			if (errno != ENOENT)
				break;
		} else if (S_ISREG(s.st_mode) && s.st_size / 512 > s.st_blocks) {
			*bytes += (uint64_t)s.st_size - (uint64_t)s.st_blocks * 512;
		}
	}
	error = errno;
	closedir(d);
	return error;
}

/* Write back all of the file system that fd is on; 0 or an errno.  Python has no such function. */
int pk_syncfs(int fd)
{
	return syncfs(fd) ? errno : 0;
}
