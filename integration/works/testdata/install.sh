# Runs inside the new root: installs what the rows need and makes two small repositories.
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get update
apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-unsafe-io \
    rpm createrepo-c dnf zypper dracut-core sudo tmux screen vim-tiny less man-db locales systemd libcap2-bin python3-venv \
    python3-apt attr dkms gcc make linux-headers-cloud-amd64
rm -rf /usr/sbin/policy-rc.d /var/lib/apt/lists/* /var/cache/apt/archives/*.deb

echo '127.0.0.1 localhost' > /etc/hosts

# Not all modules there are: the time would go into copying them.
echo 'MODULES=list' > /etc/initramfs-tools/conf.d/works
echo 'COMPRESS=gzip' >> /etc/initramfs-tools/conf.d/works

# A unit and a tmpfiles line for the scriptlets to act on.
printf '[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n' > /lib/systemd/system/works.service
echo 'd /run/works 0750 works works -' > /usr/lib/tmpfiles.d/works.conf

# A module in source, as the packages of drivers bring it.
mkdir -p /usr/src/works-module-1.0
cp /srv/works/module/* /usr/src/works-module-1.0/

cd /srv/works
rpmbuild -bb --define "_rpmdir /srv/rpm" --define "_topdir /tmp/rpmbuild" probe.spec
rm -rf /tmp/rpmbuild
createrepo_c /srv/rpm
mkdir -p /etc/yum.repos.d /etc/zypp/repos.d
printf '[works]\nname=works\nbaseurl=file:///srv/rpm\nenabled=1\ngpgcheck=0\n' | tee /etc/yum.repos.d/works.repo > /etc/zypp/repos.d/works.repo

mkdir -p deb/DEBIAN deb/usr/share/works /srv/deb
cp control preinst postinst deb/DEBIAN/
chmod 755 deb/DEBIAN/preinst deb/DEBIAN/postinst
echo data > deb/usr/share/works/data
dpkg-deb --build deb /srv/deb/works-deb_1_all.deb
{
    dpkg-deb --field /srv/deb/works-deb_1_all.deb
    echo 'Filename: ./works-deb_1_all.deb'
    echo "Size: $(stat -c %s /srv/deb/works-deb_1_all.deb)"
    echo "SHA256: $(sha256sum < /srv/deb/works-deb_1_all.deb | cut -d' ' -f1)"
} > /srv/deb/Packages
echo 'deb [trusted=yes] file:/srv/deb ./' > /etc/apt/sources.list
