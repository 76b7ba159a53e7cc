/* The least that a udp tunnel in C can be, to hold podwire's against: poll, then one read and one sendto (or recv and write) a
 * packet, with a hop taken from each. Usage: udploop DEVICE LOCAL-ADDRESS PORT PEER-ADDRESS. Says "ready", runs until killed.
 * Every packet goes to the one peer. */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* RFC 1141: the checksum grows by what the hop field loses. Returns 0 for a packet that may not go on. */
static int spend_hop(unsigned char *packet, ssize_t length)
{
    if (length < 20 || packet[0] >> 4 != 4 || packet[8] <= 1)
        return 0;
    packet[8]--;
    uint32_t sum = ((uint32_t)packet[10] << 8 | packet[11]) + 0x100;
    sum += sum >> 16;
    packet[10] = sum >> 8;
    packet[11] = sum;
    return 1;
}

static struct sockaddr_in address(const char *text, int port)
{
    struct sockaddr_in found = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, text, &found.sin_addr) != 1)
        fail(text);
    return found;
}

int main(int argc, char **argv)
{
    static unsigned char packet[65536];
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int buffer = 4 << 20;
    if (argc != 5)
        return 2;
    strncpy(request.ifr_name, argv[1], IFNAMSIZ - 1);
    struct sockaddr_in local = address(argv[2], atoi(argv[3])), peer = address(argv[4], atoi(argv[3]));
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (tun < 0 || ioctl(tun, TUNSETIFF, &request) < 0)
        fail(argv[1]);
    int udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    setsockopt(udp, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    setsockopt(udp, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    if (udp < 0 || bind(udp, (struct sockaddr *)&local, sizeof local) < 0)
        fail(argv[2]);
    puts("ready");
    fflush(stdout);
    struct pollfd ends[] = {{.fd = tun, .events = POLLIN}, {.fd = udp, .events = POLLIN}};
    for (;;) {
        if (poll(ends, 2, -1) < 0 && errno != EINTR)
            fail("poll");
        ssize_t length;
        while ((length = read(tun, packet, sizeof packet)) > 0)
            if (spend_hop(packet, length))
                (void)!sendto(udp, packet, length, 0, (struct sockaddr *)&peer, sizeof peer);
        while ((length = recv(udp, packet, sizeof packet, 0)) > 0)
            if (spend_hop(packet, length))
                (void)!write(tun, packet, length);
    }
}
