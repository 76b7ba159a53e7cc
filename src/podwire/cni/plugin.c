/* The CNI plugin that a container engine executes, compiled: the same as plugin.py, line by line, for those machines that
 * had a compiler when it was installed. It starts in half a millisecond where Python takes ten.
 *
 * It hands environment and configuration to the node's agent over a Unix socket, with the container's namespace as a
 * descriptor, and prints the answer. A DEL that no agent takes is kept in the spool. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef SOCKET
#define SOCKET "/run/podwire/cni.sock"
#endif
#define TIMEOUT_SECONDS 90
#define SPOOL_IT 9 /* the agent's answer to a DEL that it can neither do nor keep */
#define NO_ANSWER -1

struct bytes {
    char *data;
    size_t length, room;
};

static const char *const VARIABLES[] = {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"};

static const char *variable(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int fail(int code, const char *message, const char *details) {
    printf("{\"cniVersion\":\"1.1.0\",\"code\":%d,\"msg\":\"%s\",\"details\":\"", code, message);
    for (const char *c = details; *c; c++) {
        if ((unsigned char)*c >= ' ') putchar(*c == '"' ? '\'' : *c == '\\' ? '/' : *c);
    }
    printf("\"}\n");
    return 1;
}

static void append(struct bytes *to, const char *data, size_t length) {
    if (to->length + length > to->room) {
        to->room = (to->length + length) * 2 + 4096;
        to->data = realloc(to->data, to->room);
        if (!to->data) exit(fail(5, "out of memory", ""));
    }
    memcpy(to->data + to->length, data, length);
    to->length += length;
}

/* Read to the end; -1 where that fails. */
static int read_all(int fd, struct bytes *into) {
    char block[65536];
    for (;;) {
        ssize_t got = read(fd, block, sizeof block);
        if (got > 0) append(into, block, got);
        else if (got == 0) return 0;
        else if (errno != EINTR) return -1;
    }
}

static int write_all(int fd, const char *data, size_t length) {
    while (length) {
        ssize_t sent = write(fd, data, length);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) return -1;
        data += sent;
        length -= sent;
    }
    return 0;
}

/* The first bytes carry the namespace's descriptor: the agent may not see the engine's paths. */
static int send_request(int agent, int netns, const struct bytes *request) {
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr aligned;
    } control;
    struct iovec part = {request->data, request->length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (netns >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.room;
        message.msg_controllen = sizeof control.room;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &netns, sizeof(int));
    }
    ssize_t sent;
    do sent = sendmsg(agent, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0) return -1;
    return write_all(agent, request->data + sent, request->length - sent);
}

/* The agent's exit status, its document in `answer` from `*start` on; NO_ANSWER without a whole one. */
static int ask(const char *path, const struct bytes *request, struct bytes *answer, size_t *start) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = TIMEOUT_SECONDS};
    int status = NO_ANSWER, taken = 0;
    size_t length;
    answer->length = 0;
    if (strlen(path) >= sizeof address.sun_path) return NO_ANSWER;
    strcpy(address.sun_path, path);
    int netns = open(variable("CNI_NETNS"), O_RDONLY | O_CLOEXEC);
    int agent = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (agent >= 0 && !setsockopt(agent, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) &&
        !setsockopt(agent, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) &&
        !connect(agent, (struct sockaddr *)&address, sizeof address) && !send_request(agent, netns, request) &&
        !shutdown(agent, SHUT_WR) && !read_all(agent, answer)) {
        append(answer, "", 1); /* ends the text for sscanf; not part of the document */
        if (sscanf(answer->data, "%d %zu%n", &status, &length, &taken) != 2 || answer->data[taken] != '\n' ||
            answer->length - 1 - (taken + 1) != length)
            status = NO_ANSWER;
        answer->length -= 1;
        *start = taken + 1;
    }
    if (agent >= 0) close(agent);
    if (netns >= 0) close(netns);
    return status;
}

static int make_directories(char *path) {
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int made = mkdir(path, 0755);
        *slash = '/';
        if (made && errno != EEXIST) return -1;
    }
    return mkdir(path, 0700) && errno != EEXIST ? -1 : 0;
}

/* The file's name says all, so that it is whole from the first moment. */
static int spool(const char *socket_path) {
    char directory[4096], file[8192];
    const char *container = variable("CNI_CONTAINERID"), *ifname = variable("CNI_IFNAME");
    if (strchr(container, '/') || strchr(ifname, '/')) return errno = EINVAL, -1;
    if (snprintf(directory, sizeof directory, "%s.spool", socket_path) >= (int)sizeof directory ||
        snprintf(file, sizeof file, "%s/%s@%s", directory, container, ifname) >= (int)sizeof file)
        return errno = ENAMETOOLONG, -1;
    if (make_directories(directory)) return -1;
    int fd = open(file, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    return fd < 0 ? -1 : close(fd);
}

int main(void) {
    struct bytes config = {0}, request = {0}, answer = {0};
    const char *command = variable("CNI_COMMAND"), *path = variable("PODWIRE_CNI_SOCKET");
    size_t start = 0;
    if (!*path) path = SOCKET;
    if (read_all(0, &config)) return fail(5, "the configuration cannot be read", strerror(errno));
    if (!strcmp(command, "VERSION")) {
        puts("{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}");
        return 0;
    }
    /* What a DEL must name: one without is nobody's, and never kept. */
    int unnamed = !*variable("CNI_CONTAINERID"), nowhere = !*variable("CNI_IFNAME");
    if (!strcmp(command, "DEL") && (unnamed || nowhere)) {
        const char *missing = !nowhere ? "CNI_CONTAINERID" : !unnamed ? "CNI_IFNAME" : "CNI_CONTAINERID,CNI_IFNAME";
        char message[128];
        snprintf(message, sizeof message, "required env variables [%s] are missing", missing);
        return fail(4, message, "");
    }
    append(&request, "podwire-cni 1\n", 14);
    for (size_t i = 0; i < sizeof VARIABLES / sizeof *VARIABLES; i++) {
        const char *value = variable(VARIABLES[i]);
        if (!*value) continue;
        append(&request, VARIABLES[i], strlen(VARIABLES[i]));
        append(&request, "=", 1);
        append(&request, value, strlen(value) + 1);
    }
    append(&request, "", 1);
    if (config.length) append(&request, config.data, config.length);
    int status = ask(path, &request, &answer, &start);
    if ((status == NO_ANSWER || status == SPOOL_IT) && !strcmp(command, "DEL")) {
        if (spool(path)) return fail(5, "the DEL could not be kept for the agent", strerror(errno));
        /* An agent that began to listen after the first try may have looked into the spool before that. Whatever it says
         * now: the DEL is kept, and it will do it. */
        ask(path, &request, &answer, &start);
        return 0;
    }
    if (status == NO_ANSWER) {
        int code = strcmp(command, "STATUS") ? 11 : 50;
        return fail(code, "podwire's agent does not answer", path);
    }
    if (answer.length > start && write_all(1, answer.data + start, answer.length - start)) return 1;
    return status;
}
