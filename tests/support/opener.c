/*
 * Opens a file in every way, and does with it what programs do with memory.  Linked statically.  A
 * line for each step: its name, and the first bytes that were read, or what failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *file;

static void check(int ok, const char *what)
{
	if (!ok) {
		printf("%s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static void show(const char *what, int fd)
{
	char text[64] = "";

	check(fd >= 0, what);
	check(pread(fd, text, sizeof(text) - 1, 0) > 0, what);
	text[strcspn(text, "\n")] = 0;
	printf("%s: %s\n", what, text);
	fflush(stdout);
}

static void use_as_memory(int fd)
{
	struct stat s;
	char *shared, *private;

	check(!fstat(fd, &s), "fstat");
	check(!ftruncate(fd, s.st_size), "ftruncate");
	check(!fallocate(fd, 0, 0, s.st_size), "fallocate");
	shared = mmap(NULL, (size_t)s.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	check(shared != MAP_FAILED, "MAP_SHARED");
	private = mmap(NULL, (size_t)s.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	check(private != MAP_FAILED, "MAP_PRIVATE");
	check(!madvise(shared, (size_t)s.st_size, MADV_WILLNEED), "madvise");
	check(!madvise(shared, (size_t)s.st_size, MADV_DONTFORK), "madvise");
	strcpy(private + 8192, "nobody sees this");
	strcpy(shared + 4096, "stored by a mapping");
	printf("memory: %s\n", private + 4096);
}

static void *in_thread(void *unused)
{
	(void)unused;
	show("thread", open(file, O_RDONLY));
	return NULL;
}

static void send_descriptor(int to, int fd)
{
	char room[CMSG_SPACE(sizeof(int))] = "", byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr m = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room,
			    .msg_controllen = sizeof(room) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(int));
	check(sendmsg(to, &m, 0) == 1, "sendmsg");
}

static int receive_descriptor(int from)
{
	char room[CMSG_SPACE(sizeof(int))], byte;
	struct iovec data = { &byte, 1 };
	struct msghdr m = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room,
			    .msg_controllen = sizeof(room) };
	int fd;

	check(recvmsg(from, &m, 0) == 1 && CMSG_FIRSTHDR(&m), "recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int));
	return fd;
}

static void in_child(void)
{
	int pair[2], status;
	pid_t pid;

	check(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
	fflush(stdout);
	pid = fork();
	check(pid >= 0, "fork");
	if (!pid) {
		int fd = open(file, O_RDWR);

		show("child", fd);
		send_descriptor(pair[1], fd);
		_exit(0);
	}
	show("passed on", receive_descriptor(pair[0]));
	check(waitpid(pid, &status, 0) == pid && !status, "child");
}

int main(int argc, char **argv)
{
	struct open_how how = { .flags = O_RDWR | O_CLOEXEC };
	char again[64], *slash;
	pthread_t thread;
	int fd;

	check(argc == 2, "arguments");
	file = argv[1];
	fd = (int)syscall(SYS_open, file, O_RDWR, 0);
	show("open", fd);
	use_as_memory(fd);
	snprintf(again, sizeof(again), "/proc/self/fd/%d", fd);
	show("/proc/self/fd", open(again, O_RDONLY));
	show("openat2", (int)syscall(SYS_openat2, AT_FDCWD, file, &how, sizeof(how)));
	show("O_CREAT", open(file, O_RDWR | O_CREAT, 0600));
	check(open(file, O_RDWR | O_CREAT | O_EXCL, 0600) < 0 && errno == EEXIST, "O_EXCL");
	check(!pthread_create(&thread, NULL, in_thread, NULL), "pthread_create");
	pthread_join(thread, NULL);
	in_child();
	slash = strrchr(argv[1], '/');
	*slash = 0;
	fd = open(argv[1], O_PATH | O_DIRECTORY);
	show("openat", openat(fd, slash + 1, O_RDONLY));
	return 0;
}
